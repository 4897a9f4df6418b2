"""A checkpoint with fewer experts: what is left computes what a router without the others would choose."""

import pytest
import torch
from transformers import AutoConfig

from benchmarks.studies.experts_seen import in_place_of
from moe_precision import (
    CheckpointError,
    PrecisionPlan,
    allocate,
    find_moe_layers,
    load_model,
    prune_checkpoint,
    quantize_checkpoint,
)
from moe_precision.cli.main import main
from moe_precision.plans.widths import PlanError
from moe_precision.quantize.pruning import PruneError
from tests.support.dropped import observed
from tests.support.model_zoo import build_tiny
from tests.support.models import build, logits


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "switch_transformers", "gpt_oss"])
def run(request, tmp_path_factory):
    """A float checkpoint with a plan and the files beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"num_experts_per_tok": 2} if request.param == "qwen3_moe" else {}
    model, given, _ = observed(request.param, **changes)
    model.save_pretrained(folder / "float")
    plan = allocate(model, bits=(0, 1, 2), average_bits=1.2, min_tokens=0, **given)
    plan.save(folder / "plan.json")
    given["statistics"].save(folder / "plan.statistics.safetensors")
    given["curvature"].save(folder / "plan.curvature.safetensors")
    return folder, model, plan


def gone_of(plan, keep):
    """The experts of each layer whose absence costs least."""
    found = {}
    for name, layer in plan.layers.items():
        costs = [sum(of) for of in zip(*(by[0] for by in layer.costs.values()), strict=True)]
        found[name] = sorted(range(8), key=lambda expert, costs=costs: costs[expert])[: 8 - keep]
    return found


@pytest.mark.slow
def test_the_experts_left_serve_all_tokens(run, tmp_path):
    folder, model, plan = run
    assert main(["prune", str(folder / "float"), str(folder / "plan.json"), str(tmp_path / "out"), "--keep", "6"]) == 0
    pruned, gone = load_model(tmp_path / "out"), gone_of(plan, 6)
    assert [layer.num_experts for layer in find_moe_layers(pruned)] == [6, 6]
    for name, shape in ((layer.name, layer) for layer in find_moe_layers(pruned)):
        old = next(layer for layer in find_moe_layers(model) if layer.name == name)
        kept = [expert for expert in range(8) if expert not in gone[name]]
        for place, expert in enumerate(kept):
            for projection, matrix in shape.expert_weights(place).items():
                assert torch.equal(matrix, old.expert_weights(expert)[projection])
        assert torch.equal(shape.router_weight()[:6], old.router_weight()[kept])
    if model.config.model_type in ("mixtral", "qwen3_moe"):  # an independent way to choose among fewer experts
        with in_place_of("next best expert", find_moe_layers(model), gone, {}, model):
            torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=1e-5)
    left = PrecisionPlan.load(tmp_path / "out" / "precision_plan.json")
    left.check(pruned)
    files = {kind: tmp_path / "out" / f"precision_plan.{kind}.safetensors" for kind in ("statistics", "curvature")}
    quantize_checkpoint(tmp_path / "out", left, tmp_path / "packed", **files)
    assert logits(load_model(tmp_path / "packed")).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["mixtral"], indirect=True)
def test_what_cannot_be_pruned(run, tmp_path):
    folder, model, plan = run
    out = tmp_path / "out"
    uneven = plan.with_bits({"model.layers.0.mlp": [0, 0, 2, 2, 2, 2, 2, 2], "model.layers.1.mlp": [0] + [2] * 7})
    with pytest.raises(PruneError, match=r"leaves 6 to 7 experts in a layer.*--keep 7"):
        prune_checkpoint(folder / "float", uneven, out)
    uniform = allocate(model, method="uniform", average_bits=2, group_size=32)
    with pytest.raises(PruneError, match="drops no expert"):
        prune_checkpoint(folder / "float", uniform, out)
    with pytest.raises(PruneError, match="needs what the absence of each expert costs"):
        prune_checkpoint(folder / "float", uniform, out, keep=6)
    with pytest.raises(PruneError, match=r"keep=1: layer 'model\.layers\.0\.mlp' has 8 experts, of which 2 serve"):
        prune_checkpoint(folder / "float", plan, out, keep=1)
    with pytest.raises(CheckpointError, match="lies in, the float checkpoint"):
        prune_checkpoint(folder / "float", plan, folder / "float" / "out", keep=6)
    assert not out.exists()
    even = uniform.with_bits({key: [0, 2, 2, 2, 2, 2, 2, 0] for key in plan.layers})
    assert prune_checkpoint(folder / "float", even, out).average_bits == 2


@pytest.mark.slow
def test_another_model_and_groups_of_experts(tmp_path):
    model, given, _ = observed("deepseek_v3")
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, bits=(0, 1, 2), average_bits=1.2, min_tokens=0, **given)
    with pytest.raises(PruneError, match="chooses among groups of experts"):
        prune_checkpoint(tmp_path / "float", plan, tmp_path / "out", keep=6)
    other = allocate(observed("mixtral")[0], method="uniform", average_bits=2, group_size=32)
    with pytest.raises(PlanError, match=r"for another model|of type 'mixtral'"):
        prune_checkpoint(tmp_path / "float", other, tmp_path / "out", keep=6)


def even_plan(model):
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    return plan.with_bits({name: [0, 2, 2, 2, 2, 2, 2, 0] for name in plan.layers})


@pytest.mark.slow
def test_only_the_number_of_experts_changes(tmp_path):
    model = build("switch_transformers", expert_capacity=8)  # as many tokens for an expert as there are experts
    model.save_pretrained(tmp_path / "float")
    prune_checkpoint(tmp_path / "float", even_plan(model), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_experts, config.expert_capacity) == (6, 8)


@pytest.mark.slow
def test_experts_that_are_picked_by_a_table(tmp_path):
    model = build_tiny("deepseek_v4")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(PruneError, match="has a table of experts by token id"):
        prune_checkpoint(tmp_path / "float", even_plan(model), tmp_path / "out")


@pytest.mark.parametrize("run", ["mixtral"], indirect=True)
def test_experts_of_which_too_little_is_known_stay(run, tmp_path):
    folder, _, plan = run
    data = plan.to_dict()
    data["settings"]["min_tokens"] = 10
    for layer in data["layers"].values():
        layer["signals"]["tokens"][:2] = [9, 9]
        for costs in layer["costs"].values():
            costs["0"][:3] = [1e-9, 1e-9, 0]  # the least of all; the third never had a gradient
    plan = PrecisionPlan.from_dict(data)
    left = prune_checkpoint(folder / "float", plan, tmp_path / "out", keep=5)
    assert all(layer.signals["tokens"][:2] == [9, 9] for layer in left.layers.values())
    assert "statistics" not in left.notes  # it counts the tokens of all
    old = plan.layers["model.layers.0.mlp"].router_norms["last"]
    assert left.layers["model.layers.0.mlp"].router_norms["last"][:3] == old[:3]
    with pytest.raises(PruneError, match=r"keep=2: of 3 experts of layer .* too little is known"):
        prune_checkpoint(folder / "float", plan, tmp_path / "fewer", keep=2)
