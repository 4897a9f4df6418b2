"""A budget for the whole model: what its other parts take is counted by hand, and the files that are written fit."""

import pytest
import torch
from torch.utils.data import DataLoader

from moe_precision import AllocationError, PrecisionPlan, RouterNormHistory, allocate, quantize_checkpoint, replan
from moe_precision.allocation.whole_model import with_rest
from moe_precision.cli.main import main
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.settings import PlanSettings
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build
from tests.support.trainers import Module, monitor, trainer

EXPERTS = 2 * 8 * 3 * 64 * 128
ATTENTION = 2 * 64 * 64 + 2 * 64 * 32
REST = 2 * (ATTENTION + 8 * 64 + 2 * 64) + 2 * 128 * 64 + 64  # with router and norms; embeddings, head, last norm
HOW = {"method": "weight_error", "bits": (1, 2, 3, 4), "group_size": 64}


def total(stored_bits, itemsize=4):
    """GiB of the whole model with float parts and experts at so many bits."""
    return (EXPERTS * stored_bits / 8 + itemsize * REST) / 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = build("mixtral").bfloat16()
    assert sum(one.numel() for one in model.parameters()) == EXPERTS + REST
    model.save_pretrained(path := tmp_path_factory.mktemp("whole") / "model")
    return path


@pytest.mark.slow
def test_what_is_left_for_the_experts(folder):
    plan = allocate(build("mixtral"), **HOW, total_gib=total(2.5 + 18 / 64))
    assert plan.stored_bits == pytest.approx(2.5 + 18 / 64, abs=1e-3)
    assert plan.settings.rest_gib == 4 * REST / 2**30
    assert plan.settings.budget.endswith("GiB in total")
    of_file = allocate(folder, **HOW, total_gib=total(2.5 + 18 / 64, itemsize=2))  # the same in bfloat16
    assert of_file.settings.rest_gib == 2 * REST / 2**30
    assert PrecisionPlan.from_dict(of_file.to_dict()) == of_file
    smaller = replan(plan, total_gib=total(2 + 18 / 64))
    assert smaller.stored_bits == pytest.approx(2 + 18 / 64, abs=1e-3)
    assert replan(plan, average_bits=3).average_bits == 3


@pytest.mark.slow
def test_the_command_and_the_files_that_it_leads_to(folder, tmp_path, capsys):
    bits = [2.25 + 18 / 64, 8 + 18 / 64]  # of experts, and of attention
    gib = (EXPERTS * bits[0] / 8 + 2 * ATTENTION * bits[1] / 8 + 2 * (REST - 2 * ATTENTION)) / 2**30
    output = str(tmp_path / "plan.json")
    how = ["--method", "weight_error", "--group-size", "64", "-o", output]
    assert main(["plan", str(folder), "--total-gib", str(gib), "--non-expert-bits", "8", *how]) == 0
    assert "give quantize what this plan was made with: --non-expert-bits 8" in capsys.readouterr().out
    plan = PrecisionPlan.load(output)
    assert plan.stored_bits == pytest.approx(bits[0], abs=2e-3)
    quantize_checkpoint(folder, plan, tmp_path / "out", non_expert_bits=8)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written / 2**30 == pytest.approx(gib, rel=0.1)  # with names, checksums, and scales kept in whole blocks


def test_a_history_alone_does_not_know_the_rest(tmp_path, capsys):
    layers = find_moe_layers(model := build("mixtral"))
    history = RouterNormHistory.of(layers, "mixtral")
    for step in (0, 1):
        history.record(step, router_norms(layers) * (1 + step))
    path = tmp_path / "x.history.safetensors"
    history.save(path)
    asked = ["plan", str(path), "--total-gib", str(total(2.5 + 18 / 64)), "--group-size", "64", "--bits", "2", "3"]
    asked += ["-o", str(tmp_path / "plan.json")]
    assert main(asked) == 2
    assert "what is beside its experts is not known: give the model or its checkpoint" in capsys.readouterr().err
    rest = with_rest(PlanSettings(total_gib=1.0, group_size=64), model).rest_gib
    assert main([*asked, "--rest-gib", str(rest)]) == 0
    assert PrecisionPlan.load(tmp_path / "plan.json").average_bits == 2.5


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"total_gib": 1.0, "expert_gib": 1.0}, "are 2 budgets"),
        ({"rest_gib": 1.0}, "a part of total_gib, which is not given"),
        (
            {"total_gib": 4 * REST / 2**30},
            r"less 0\.0001576 for the rest, for 393216 expert weights: stored_bits=0\.0 is",
        ),
    ],
)
def test_budgets_that_cannot_be(budget, message):
    with pytest.raises(AllocationError, match=message):
        allocate(build("mixtral"), **HOW, **budget)


def test_a_run_takes_it_too(tmp_path):
    data = DataLoader(torch.randint(3, 128, (8, 8)), batch_size=2)
    callback = monitor(total_gib=1e-4, average_bits=None)
    with pytest.raises(AllocationError, match="for the rest"):  # before the first step
        trainer(tmp_path, callback).fit(Module(), data)
