"""The paper's rules against its own tables, and every bad budget an error."""

from itertools import product

import pytest
import torch

from moe_precision import AllocationError, HistoryError, PlanError, RouterNormHistory, allocate
from moe_precision.allocation.orders import bits_from_order, rank_experts
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recording.router_norms import router_norms


@pytest.mark.parametrize(
    ("experts", "average", "counts"),  # counts of 1, 2 and 3 bits, from the paper's three-level rule
    [
        (8, 1.5, (4, 4, 0)),
        (8, 1.75, (3, 4, 1)),
        (8, 2.0, (2, 4, 2)),
        (8, 2.25, (2, 2, 4)),
        (8, 2.5, (2, 0, 6)),
        (8, 2.75, (1, 0, 7)),
        (64, 2.0, (21, 22, 21)),
        (64, 2.25, (16, 16, 32)),
        (64, 2.5, (16, 0, 48)),
    ],
)
def test_three_levels(experts, average, counts):
    widths = bits_from_order(range(experts), average, (1, 2, 3))
    assert tuple(widths.count(bits) for bits in (1, 2, 3)) == counts
    assert widths == sorted(widths, reverse=True)  # the first of the order get the most


@pytest.mark.parametrize("average", [1.0, 1.1, 1.3, 1.6, 1.7, 1.9, 2.1, 2.3, 2.34, 2.6, 2.9, 3.0])
@pytest.mark.parametrize("experts", [3, 5, 8, 16])
def test_three_levels_reach_the_largest_total(experts, average):
    total = sum(bits_from_order(range(experts), average, (1, 2, 3)))
    reachable = [sum(choice) for choice in product((1, 2, 3), repeat=min(experts, 5))] if experts <= 5 else None
    budget = experts * average + 1e-9
    best = max(t for t in reachable if t <= budget) if reachable else int(budget)
    assert total == best


def test_two_levels_round_down_without_float_error():
    # (2.3 - 2) * 10 is 2.9999... in floats; the paper's count is 3
    assert bits_from_order(range(10), 2.3, (2, 3)).count(3) == 3
    assert bits_from_order([2, 0, 1], 2.5, (2, 3)) == [2, 2, 3]
    assert bits_from_order(range(8), 2.25, (2, 4)).count(4) == 1


def test_ranking_is_ascending_and_stable():
    assert rank_experts(torch.tensor([0.3, -0.1, 0.2, -0.1])) == [1, 3, 2, 0]


def test_large_variance_moves_in_front():
    change = torch.tensor([0.0, 1.0, 2.0, 3.0])
    # 3 * 1.0 < 3.5: expert 3 goes in front of the first expert with variance below 3.5 / 3, which is expert 1
    assert rank_experts(change, torch.tensor([2.0, 1.0, 1.0, 3.5])) == [0, 3, 1, 2]
    assert rank_experts(change, torch.tensor([2.0, 1.0, 1.0, 3.0])) == [0, 1, 2, 3]  # exactly 3 times: stays
    assert rank_experts(change, torch.tensor([1.0, 1.0, 4.0, 5.0])) == [3, 2, 0, 1]


def test_ranking_refuses_what_is_not_finite():
    with pytest.raises(AllocationError, match="finite"):
        rank_experts(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    ("average", "bits", "message"),
    [
        (1.5, (2, 3), r"average_bits=1.5 is outside the levels \[2, 3\]"),
        (3.5, (2, 3), "outside"),
        (2.0, (1, 2, 4), r"equally spaced.*\[1, 2, 4\]"),
        (2.0, (1, 2, 3, 4), "one, two or three levels, got 4"),
        (2.0, (), r"list the levels.*got \(\)"),
        (2.0, 2, "list the levels.*got 2"),
        (1.0, (0, 2), "0 bits drop an expert, and the paper's rule cannot tell"),
    ],
)
def test_bad_budgets(average, bits, message):
    with pytest.raises(AllocationError, match=message):
        bits_from_order(range(8), average, bits)


@pytest.mark.parametrize("bits", [(2, 9), (-1, 3)])
def test_bad_widths(bits):
    with pytest.raises(PlanError, match="bits must be 1 to 8, 16"):
        bits_from_order(range(8), 2, bits)


def recorded(model, steps=(0, 5)):
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    for step in steps:
        norms = router_norms(layers)
        history.record(step, norms + step * torch.arange(len(norms)).flip(0) / 100)
    history.measure_variance(layers)
    return history


def test_a_plan_from_a_history_ranks_by_the_change(mixtral):
    plan = allocate(history=recorded(mixtral), average_bits=2.5, bits=(2, 3), group_size=64)
    layer = plan.layers["model.layers.0.mlp"]
    assert layer.order == [7, 6, 5, 4, 3, 2, 1, 0]  # the change falls with the index
    assert layer.bits == [2, 2, 2, 2, 3, 3, 3, 3]
    assert plan.baseline_step == 0
    assert plan.last_step == 5
    assert plan.average_bits == 2.5
    assert plan.stored_bits == 2.5 + 18 / 64


def test_without_a_history_the_final_norm_ranks_and_the_plan_says_so(mixtral):
    plan = allocate(mixtral, group_size=64)
    assert plan.to_dict()["baseline"] == "none"
    norms = mixtral.get_parameter("model.layers.0.mlp.gate.weight").norm(dim=1)
    assert plan.layers["model.layers.0.mlp"].order == norms.argsort().tolist()
    assert "final_router_norm" in plan.layers["model.layers.0.mlp"].signals


def test_controls(mixtral):
    history = recorded(mixtral)
    make = lambda **kw: allocate(history=history, group_size=64, **kw).layers["model.layers.1.mlp"]  # noqa: E731
    assert make(method="reversed").order == make().order[::-1]
    assert make(method="random", seed=1).order == make(method="random", seed=1).order
    assert make(method="random", seed=1).order != make(method="random", seed=2).order
    assert make(method="uniform", average_bits=3).bits == [3] * 8
    with pytest.raises(AllocationError, match="gives all experts one width"):
        make(method="uniform", average_bits=2.5)
    with pytest.raises(AllocationError, match="average_bits=inf: expected a finite number"):
        make(method="uniform", average_bits=float("inf"))
    assert allocate(history=history, group_size=64, method="uniform", average_bits=3).to_dict()["settings"]["bits"] == [
        3
    ]
    with pytest.raises(AllocationError, match="unknown method 'best', expected one of auto, router_norm"):
        make(method="best")


def test_group_size_must_divide(mixtral):
    with pytest.raises(PlanError, match=r"group_size=128 does not divide the input width 64 of 'gate_up_proj'.*use 64"):
        allocate(mixtral, group_size=128)


def test_a_history_of_another_model(mixtral):
    history = recorded(mixtral)
    history.layers = {f"other.{name}": layer for name, layer in history.layers.items()}
    with pytest.raises(HistoryError, match="another model"):
        allocate(mixtral, history, group_size=64)


def test_a_history_without_steps(mixtral):
    with pytest.raises(HistoryError, match="no training step was recorded"):
        allocate(history=recorded(mixtral, steps=(0,)), group_size=64)
    with pytest.raises(HistoryError, match="holds no record"):
        allocate(mixtral, history=recorded(mixtral, steps=()), group_size=64)


@pytest.mark.filterwarnings("ignore:.*did not change at all")
def test_a_baseline_and_the_trained_model_make_a_change(mixtral):
    """A run that died before its first record left the baseline; the checkpoint holds the rest."""
    history = recorded(mixtral, steps=(0,))
    router = mixtral.get_parameter("model.layers.0.mlp.gate.weight")
    with torch.no_grad():
        router.mul_(torch.linspace(2, 1, 8)[:, None])
    plan = allocate(mixtral, history, group_size=64)
    before = history.first["model.layers.0.mlp"]
    change = before * (torch.linspace(2, 1, 8) - 1)
    assert plan.layers["model.layers.0.mlp"].order == change.argsort().tolist()
    assert plan.baseline_step == 0
    assert history.steps == [0]  # the caller's history is as it was


def test_a_router_that_did_not_move_is_said(mixtral):
    history = recorded(mixtral, steps=(0,))
    history.record(3, history._records[0])
    with pytest.warns(UserWarning, match="routers of 2 layers did not change at all"):
        plan = allocate(history=history, group_size=64)
    assert plan.notes["layers_without_change"] == list(plan.layers)


def test_an_order_names_every_expert_once():
    with pytest.raises(AllocationError, match="names every expert once"):
        bits_from_order([0, 0, 1], 2.5, (2, 3))


def test_an_average_that_is_a_fraction():
    assert bits_from_order(range(3), 8 / 3, (2, 3)).count(3) == 2
    assert bits_from_order(range(10), 2.1, (2, 3)).count(3) == 1
