"""What is planned, quantized and distilled inside of the caller's autocast is the same as outside of it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_precision import (
    PlanQuantizationConfig,
    allocate,
    collect_statistics,
    distill_scales,
    find_moe_layers,
    quantize_checkpoint,
    quantize_model,
)
from moe_precision.autocast import without_autocast
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.recording.gradients import curvature_of_losses
from tests.quantize.test_distilling import text
from tests.support.models import build


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small model, its folder, statistics and curvature, and a plan."""
    model, folder = build("mixtral", num_hidden_layers=1), tmp_path_factory.mktemp("float")
    model.save_pretrained(folder)
    batches = text(2)
    curvature = curvature_of_losses(
        find_moe_layers(model), [lambda: model(**batches[0], labels=batches[0]["input_ids"]).loss]
    )
    plan = allocate(model, method="uniform", average_bits=2, group_size=64)
    return model, folder, collect_statistics(model, batches), curvature, plan


def packed(model, folder, statistics, plan):
    return quantize_model(copy.deepcopy(model), plan, statistics=statistics)


def loaded(model, folder, statistics, plan):
    config = PlanQuantizationConfig(plan, statistics=statistics)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def written(model, folder, statistics, plan):
    quantize_checkpoint(folder, plan, folder.parent / "out", statistics=statistics)
    return load_model(folder.parent / "out")


def distilled(model, folder, statistics, plan):
    made = packed(model, folder, statistics, plan)
    distill_scales(made, model, text(2), steps=1, through="logits")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("make", [packed, loaded, written, distilled])
def test_packed_weights_are_the_same(make, recorded):
    model, folder, statistics, _, plan = recorded
    states = []
    for around in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            states.append(make(model, folder, statistics, plan).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.slow
def test_plans_are_the_same_and_statistics_can_be_collected(recorded):
    model, _, statistics, curvature, _ = recorded
    settings = {"method": "statistics", "group_size": 64, "curvature": curvature, "statistics": statistics}
    plan = allocate(model, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert allocate(model, **settings).to_dict() == plan.to_dict()
        found = collect_statistics(model, text(1))
    assert found.tokens.keys() == statistics.tokens.keys()


def test_autocast_is_on_again_afterwards():
    @without_autocast()
    def inner(depth):
        assert not torch.is_autocast_enabled("cpu")
        return depth and inner(depth - 1)

    with torch.autocast("cpu", torch.bfloat16):
        inner(2)
        assert torch.is_autocast_enabled("cpu")
