"""Budgets in stored bits and in GiB, bad arguments, and the parts of the paper's rule on their own."""

from dataclasses import replace

import pytest
import torch

from moe_precision import AllocationError, PlanSettings, RouterNormHistory, allocate, find_moe_layers
from moe_precision.allocation.planning import plan_from_signals
from moe_precision.allocation.snapshot import Snapshot
from moe_precision.layers.shape import LayerShape
from moe_precision.recording.router_norms import router_norms


@pytest.mark.slow
@pytest.mark.parametrize("method", ["router_norm", "load", "weight_error"])
def test_budgets_in_stored_bits_and_in_gib(method, mixtral):
    layers = find_moe_layers(mixtral)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    history.add_load({layer.name: torch.rand(2, 8) for layer in layers})
    how = {"method": method, "bits": (2, 3), "group_size": 64}
    by_bits = allocate(mixtral, history, average_bits=2.5, **how)
    assert allocate(mixtral, history, **how, stored_bits=2.5 + 18 / 64).diff(by_bits) == []
    weights = 2 * 8 * 3 * 64 * 128
    plan = allocate(mixtral, history, **how, expert_gib=2.78125 * weights / 8 / 2**30)
    assert plan.diff(by_bits) == []
    assert plan.to_dict()["settings"]["expert_gib"] == 2.78125 * weights / 8 / 2**30
    with pytest.raises(AllocationError, match=r"1.0 GiB for 393216 expert weights: stored_bits=.* outside"):
        allocate(mixtral, history, **how, expert_gib=1.0)
    with pytest.raises(AllocationError, match="are 2 budgets"):
        allocate(mixtral, history, **how, expert_gib=1.0, stored_bits=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sensitivity"}, "moe-precision compare` takes them"),
        ({"method": "curvature"}, "needs curvature"),
        ({"granularity": "layer"}, "needs what each width costs, and 'auto' has only 'router_norm' here"),
        (
            {"granularity": "layer", "method": "random"},
            "orders the experts of a layer.*needs a method that knows costs",
        ),
        ({"stored_bits": 3.0, "bits": (2, 16)}, "a method that knows costs"),
        ({"stored_bits": 9.0}, "outside what the levels"),
        ({"method": "weight_error", "granularity": "expert+layer"}, "unknown granularity"),
        ({"method": "weight_error", "average_bits": 5.0}, "outside the levels"),
    ],
)
def test_bad_arguments(settings, message, mixtral):
    with pytest.raises(AllocationError, match=message):
        allocate(mixtral, group_size=64, **settings)
    with pytest.raises(AllocationError, match="give the model or its checkpoint"):
        allocate(history="x.safetensors", method="weight_error")


def test_ablations_of_the_papers_rule(mixtral):
    layers = find_moe_layers(mixtral)
    with torch.no_grad():
        for layer in layers:
            layer.router_weight().mul_(torch.linspace(2, 1, 8).unsqueeze(1))
            bank = layer.container().gate_up_proj
            bank[3, :128] *= 10  # the largest variance by far
    norms = layers[0].router_weight().norm(dim=1)
    plan = allocate(mixtral, method="final_norm", group_size=64).layers[layers[0].name]
    assert plan.order == [3, *[e for e in norms.argsort().tolist() if e != 3]]
    plan = allocate(mixtral, method="norm_only", group_size=64).layers[layers[0].name]
    assert plan.order == norms.argsort().tolist()
    assert allocate(mixtral, method="max_variance", group_size=64).layers[layers[0].name].order[0] == 3


def _snapshot(sizes, experts=8):
    """Layers whose experts have one matrix of ``(size, 128)``, with norms that rank expert 0 first."""
    layers = {
        f"layers.{index}": LayerShape(f"layers.{index}.gate.weight", experts, {"up_proj": (size, 128)})
        for index, size in enumerate(sizes)
    }
    return Snapshot("made_up", layers, {name: torch.arange(1.0, experts + 1) for name in layers})


@pytest.mark.parametrize("method", ["final_norm", "random"])
@pytest.mark.parametrize("budget", [{"stored_bits": 2.5}, {"expert_gib": 2.5 * 4 * 8 * 64 * 128 / 2**33}])
def test_what_a_layer_leaves_over_goes_on_to_the_next(method, budget):
    """A stored budget of 2.5 leaves 2.359375 bits for codes: 2.875 of the 8 experts of each layer at 3 bits."""
    settings = PlanSettings(method=method, bits=(2, 3), group_size=128, **budget)
    plan = plan_from_signals(settings, _snapshot([64] * 4), None)
    assert [layer.bits.count(3) for layer in plan.layers.values()] == [2, 3, 3, 3]  # 2.875, 5.75, 8.625, 11.5 in all
    assert plan.stored_bits == 2 + 11 / 32 + 18 / 128
    assert plan.notes["left_over"] == pytest.approx(0.5 / 32, rel=1e-3)


def test_layers_of_different_sizes_share_by_weights():
    """3.5 experts of the first layer; its half is a quarter of an expert of the second, which has 3.75 then."""
    settings = PlanSettings(method="random", bits=(2, 3), group_size=64, stored_bits=2 + 3.5 / 8 + 18 / 64)
    plan = plan_from_signals(settings, _snapshot([64, 128, 32]), None)
    counts = [layer.bits.count(3) for layer in plan.layers.values()]
    assert counts == [3, 3, 6]  # 3.5; 3.5 + 0.5 / 2 = 3.75; 3.5 + 0.75 * 4 = 6.5
    assert plan.stored_bits <= settings.stored_bits
    assert plan.notes["left_over"] == pytest.approx(0.5 * 32 / (8 * 224), rel=1e-3)


def test_nominal_bits_are_the_papers_rule_layer_by_layer():
    settings = PlanSettings(method="random", bits=(2, 3), group_size=128, average_bits=2.359375)
    plan = plan_from_signals(settings, _snapshot([64] * 4), None)
    assert [layer.bits.count(3) for layer in plan.layers.values()] == [2, 2, 2, 2]
    assert plan.notes["left_over"] == pytest.approx(0.875 / 8, rel=1e-3)
    exact = plan_from_signals(replace(settings, average_bits=2.5), _snapshot([64] * 4), None)
    assert exact.average_bits == 2.5
    assert "left_over" not in exact.notes


def test_a_budget_at_the_highest_level_is_no_more_than_that():
    settings = PlanSettings(method="random", bits=(2, 3), group_size=64, stored_bits=3 + 18 / 64)
    plan = plan_from_signals(settings, _snapshot([64] * 3), None)
    assert plan.average_bits == 3
    assert "left_over" not in plan.notes


@pytest.mark.parametrize("stored_bits", [1.4, 2.0, 2.21, 2.77, 3.0])
def test_three_levels_use_the_budget_up_to_one_step(stored_bits):
    settings = PlanSettings(method="random", bits=(1, 2, 3), group_size=64, stored_bits=stored_bits)
    plan = plan_from_signals(settings, _snapshot([64] * 5), None)
    assert 0 <= stored_bits - plan.stored_bits < 1 / 40 + 1e-9
