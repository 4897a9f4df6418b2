"""Experts at 0 bits, packed: nothing is stored of them, and they add nothing to the output."""

import copy

import pytest
import torch
from safetensors import safe_open

from moe_precision import (
    PlanQuantizationConfig,
    PrecisionPlan,
    allocate,
    dequantize_model,
    distill_scales,
    find_moe_layers,
    load_model,
    quantize_checkpoint,
    quantize_model,
)
from moe_precision.export import TARGETS, ExportError, export
from moe_precision.plans.widths import PlanError
from moe_precision.quantize.codec.grid import Grid, on_grid
from moe_precision.quantize.trainable import TrainableScales
from tests.support.dropped import observed
from tests.support.models import build, logits

DROPPED = [1, 4, 6]


def plan_for(model, dropped=DROPPED, bits=4):
    plan = allocate(model, method="uniform", average_bits=bits, group_size=32)
    return plan.with_bits({name: [0 if e in dropped else bits for e in range(8)] for name in plan.layers})


@torch.no_grad()
def without(model, dropped):
    """The same model with zeros in the place of the matrices of some experts."""
    model = copy.deepcopy(model)
    for layer in find_moe_layers(model):
        for expert in dropped:
            for matrix in layer.expert_weights(expert).values():
                matrix.zero_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "nllb-moe", "gpt_oss"])
def test_a_packed_model_is_that_with_zeros(family, tmp_path):
    model = build(family)
    plan = plan_for(model, bits=8)
    packed = quantize_model(copy.deepcopy(model), plan)
    whole = quantize_model(without(model, DROPPED), allocate(model, method="uniform", average_bits=8, group_size=32))
    torch.testing.assert_close(logits(packed), logits(whole), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "packed")
    again = load_model(tmp_path / "packed")
    assert torch.equal(logits(again), logits(packed))
    assert any("dropped" in text for text in again.moe_precision_kernels().values())
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "bits_0" in name]  # noqa: SIM118
    floats = dequantize_model(again)
    for layer in find_moe_layers(floats):
        for expert in range(8):
            assert all(matrix.any() == (expert not in DROPPED) for matrix in layer.expert_weights(expert).values())


def test_nothing_is_stored(tmp_path):
    model = build("mixtral")
    all_kept = quantize_model(copy.deepcopy(model), plan_for(model, dropped=[]))
    some = quantize_model(copy.deepcopy(model), plan_for(model))
    sizes = [sum(b.nbytes for n, b in one.named_buffers() if ".packed." in n) for one in (all_kept, some)]
    assert sizes[1] * 8 == sizes[0] * 5  # three of eight experts are gone


def test_tokens_of_dropped_experts_alone():
    model = quantize_model(build("mixtral"), plan_for(build("mixtral"), dropped=[0, 1, 2, 3, 4, 5]))
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(5, 64, requires_grad=True)
    index, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    output = experts(hidden, index, weights)
    assert not output.any()
    output.sum().backward()
    assert not hidden.grad.any()
    some = experts(hidden, torch.tensor([[0, 6]] * 5), weights)
    both = experts(hidden, torch.tensor([[7, 6]] * 5), weights)
    torch.testing.assert_close(both - some, experts(hidden, torch.tensor([[7, 0]] * 5), weights))


@pytest.mark.slow
def test_distilled_scales_know_that_experts_are_gone():
    model, given, data = observed("mixtral")
    plan = plan_for(model, bits=2)
    packed = quantize_model(copy.deepcopy(model), plan, statistics=given["statistics"])
    weights = TrainableScales.of_packed(find_moe_layers(model)[0], packed).weights()
    for name, weight in weights.items():
        assert [bool(matrix.any()) for matrix in weight] == [e not in DROPPED for e in range(8)], name
    distilled = distill_scales(packed, model, data, steps=8)
    assert all(after < before for before, after in distilled.errors.values())


def test_a_grid_of_dropped_experts():
    model = build("mixtral")
    layers = find_moe_layers(model)
    plan = plan_for(model)
    grid = Grid.fit(layers, plan)
    with torch.no_grad():
        for layer in layers:
            for name, bank in layer.banks.items():
                weight, widths = bank.weights[0].parameter(), plan.layers[layer.name].projection_bits[name]
                on_grid(weight, widths, grid.scales[layer.name][name], grid.offsets[layer.name][name], out=weight)
                assert [bool(matrix.any()) for matrix in weight] == [bits > 0 for bits in widths]
    expected = logits(model)
    torch.testing.assert_close(logits(quantize_model(model, plan, grid=grid)), expected, atol=1e-4, rtol=1e-4)


def test_a_config_keeps_the_plan():
    plan = plan_for(build("mixtral"))
    config = PlanQuantizationConfig(plan)
    again = PlanQuantizationConfig.from_dict(config.to_dict())
    assert again.plan.drops
    assert again.plan.diff(plan) == []


@pytest.mark.parametrize("target", TARGETS)
def test_no_export_hides_that_an_expert_is_gone(target):
    plan = plan_for(build("mixtral"))
    with pytest.raises(ExportError, match=f"drops experts.*{target} has no format for an expert that is not there"):
        export(plan, to=target)


def test_a_plan_that_does_not_say_how_many_serve_a_token():
    model = build("mixtral")
    data = plan_for(model, dropped=range(2, 8)).to_dict()
    for layer in data["layers"].values():
        del layer["top_k"]
    plan = PrecisionPlan.from_dict(data)
    plan.check(model)
    one_left = plan.with_bits({name: [4] + [0] * 7 for name in plan.layers})
    with pytest.raises(PlanError, match="7 of 8 experts are dropped and 1 are left, but 2 serve each token"):
        quantize_model(model, one_left)
