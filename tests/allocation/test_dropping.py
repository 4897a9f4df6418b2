"""Experts at 0 bits: what their absence costs, and who may be dropped."""

from itertools import product

import numpy as np
import pytest
import torch

from moe_precision import AllocationError, PlanSettings, PrecisionPlan, allocate, find_moe_layers, replan
from moe_precision.allocation import knapsack
from moe_precision.allocation.calibration import Calibration, calibrate_dropping, calibrated_costs
from moe_precision.allocation.costs import expert_costs
from moe_precision.allocation.knapsack import Choice, choose, least_cost_bits
from moe_precision.judging.simulation import SimulatedExperts
from moe_precision.layers.shape import LayerShape
from moe_precision.plans.widths import stored_bits_per_weight
from tests.support.dropped import observed

LEVELS, LAYER = (0, 1, 2), "model.layers.0.mlp"


@pytest.fixture(scope="module")
def known():
    return observed("mixtral")


def asked(**given):
    budget = {} if "stored_bits" in given else {"average_bits": 1}
    return PlanSettings(**{"method": "statistics", "bits": LEVELS, "group_size": 32, **budget, **given})


def costs_of(experts, seed=0):
    """Random costs that fall with the width."""
    generator = torch.Generator().manual_seed(seed)
    return {
        p: torch.rand(experts, 3, generator=generator, dtype=torch.float64).cumsum(1).flip(1) for p in ("up", "down")
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [{"average_bits": 0.8}, {"average_bits": 1.2}, {"stored_bits": 1.1}])
def test_the_least_cost_of_all_choices(seed, budget):
    shape = LayerShape("router", 4, {"up": (64, 32), "down": (32, 64)}, top_k=2)
    costs, tokens = costs_of(4, seed), [100, 100, 5, 100]  # of expert 2 too little is known
    found = least_cost_bits({"0": shape}, {"0": costs}, asked(**budget), {"0": tokens})
    size = (lambda bits: bits) if "average_bits" in budget else (lambda bits: stored_bits_per_weight(bits, 32))
    limit = next(iter(budget.values())) * 8
    every = []
    for widths in product([(0, 0), *product((1, 2), repeat=2)], repeat=4):
        gone = [expert for expert, both in enumerate(widths) if both == (0, 0)]
        total = sum(size(bits) for both in widths for bits in both)
        if len(gone) <= 2 and 2 not in gone and total <= limit:
            cost = sum(float(costs[p][e, b]) for e, both in enumerate(widths) for p, b in zip(costs, both, strict=True))
            every.append((cost, widths))
    cost, widths = min(every)
    assert found.cost == pytest.approx(cost)
    assert list(zip(found.bits["0"]["up"], found.bits["0"]["down"], strict=True)) == list(widths)


def test_who_may_be_dropped():
    shape = LayerShape("router", 8, {"up": (64, 32), "down": (32, 64)}, top_k=6)
    costs, tokens = {"0": costs_of(8)}, {"0": [100] * 8}
    layers = {"0": shape}
    assert least_cost_bits(layers, costs, asked(average_bits=0.8), tokens).bits["0"]["up"].count(0) == 2  # six serve
    with pytest.raises(AllocationError, match=r"max_dropped=0\.5 and min_tokens=32 forbid some 0s do not fit"):
        least_cost_bits(layers, costs, asked(average_bits=0.7), tokens)
    with pytest.raises(AllocationError, match="do not fit the budget"):
        least_cost_bits(layers, costs, asked(average_bits=0.8, max_dropped=0.2), tokens)
    few = {"0": [100, 31, 31, 31, 31, 31, 31, 100]}
    assert set(least_cost_bits(layers, costs, asked(average_bits=0.8), few).bits["0"]["up"][1:7]) == {1}
    with pytest.raises(AllocationError, match="needs the tokens of expert statistics"):
        least_cost_bits(layers, costs, asked(), None)


def test_an_expert_without_gradient_is_kept():
    shape = LayerShape("router", 4, {"up": (64, 32), "down": (32, 64)})
    costs = costs_of(4)
    for of in costs.values():
        of[1] = 0.0
    found = least_cost_bits({"0": shape}, {"0": costs}, asked(average_bits=0.75), {"0": [100] * 4})
    assert found.bits["0"]["up"][1] == 1
    assert 0 in found.bits["0"]["up"]
    assert found.indifferent == 1


@pytest.mark.slow
def test_the_cost_of_absence_by_hand(known):
    model, given, _ = known
    curvature, statistics = given["curvature"], given["statistics"]
    costs = expert_costs(find_moe_layers(model), (0, 2), 32, curvature, statistics, together=True)
    weight = model.get_parameter(f"{LAYER}.experts.down_proj")[3].detach()
    moment = statistics.fit_moment(LAYER, "down_proj", 3, curvature.fit_weights(LAYER, "down_proj", 3))
    rows, columns = (one[LAYER]["down_proj"][3] for one in (curvature.rows, curvature.columns))
    by_row = torch.stack([row @ moment @ row for row in weight])  # the error of a row is the row
    expected = 0.5 * (rows / rows.mean() * by_row).sum() * columns.sum() / moment.trace()
    assert float(costs[LAYER]["down_proj"][3, 0]) == pytest.approx(float(expected), rel=1e-4)
    assert (costs[LAYER]["down_proj"][:, 0] > costs[LAYER]["down_proj"][:, 1]).all()


@pytest.mark.slow
def test_calibrated_absence_is_that_of_the_cheaper_half(known):
    model, given, data = known
    layers = find_moe_layers(model)
    curvature, statistics = given["curvature"], given["statistics"]
    calibration = Calibration(model, [lambda batch=b: model(**batch) for b in data[:2]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = calibrated_costs(layers[:1], (0, 2), 32, curvature, statistics, calibration, together=True)[LAYER]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    absent = sum(of[:, 0] for of in costs.values())
    cheaper = absent.argsort()[:4].tolist()
    with SimulatedExperts(layers, (2,), 32) as simulated:
        for expert in cheaper:
            for projection in ("gate_up_proj", "down_proj"):
                simulated.set((LAYER, projection, expert), 0)
        assert float(absent[cheaper].sum()) == pytest.approx(calibration.divergence(), rel=1e-3)


@pytest.mark.slow
def test_a_plan_and_another_budget(known):
    model, given, _ = known
    plan = allocate(model, bits=(0, 1, 2), average_bits=0.8, **given)
    assert plan.drops
    assert plan.method == "statistics"
    assert plan.average_bits <= 0.8
    assert plan.layers[LAYER].signals["tokens"] == given["statistics"].tokens[LAYER].tolist()
    assert plan.to_dict()["settings"]["max_dropped"] == 0.5
    assert plan.to_dict()["settings"]["min_tokens"] == 32
    again = replan(plan, average_bits=0.8)
    assert again.diff(plan) == []
    assert replan(plan, average_bits=1.8).average_bits > 1.7
    kept = allocate(model, bits=(0, 1, 2), average_bits=1, min_tokens=10_000, **given)
    assert not kept.drops


def test_curvature_alone_cannot_drop(known):
    model, given, _ = known
    without = {key: value for key, value in given.items() if key != "statistics"}
    with pytest.raises(AllocationError, match="'auto' has only 'curvature' here, which cannot tell what that costs"):
        allocate(model, bits=(0, 1, 2), average_bits=1, **without)


def test_the_cap_is_the_share_that_was_meant():
    shape = LayerShape("router", 100, {"up": (64, 32), "down": (32, 64)})
    settings = asked(bits=(0, 1), average_bits=0.71, max_dropped=0.29)  # 0.29 * 100 is below 29 as a float
    costs = {"0": {p: of[:, :2] for p, of in costs_of(100).items()}}
    assert least_cost_bits({"0": shape}, costs, settings, {"0": [100] * 100}).bits["0"]["up"].count(0) == 29


class Measured:
    """In place of a calibration: divergences in turn, and which experts were there when each was measured."""

    def __init__(self, layer, *values):
        self.layer, self.values, self.gone = layer, list(values), []

    def divergence(self):
        experts = range(self.layer.num_experts)
        self.gone.append([e for e in experts if not any(m.any() for m in self.layer.expert_weights(e).values())])
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("absent", "measured", "gone", "scale"),
    [
        ([8, 7, 6, 5, 4, 3, 2, 1], [0.5], [[4, 5, 6, 7]], 0.05),
        ([0, 0, 0, 0, 4, 3, 2, 1], [0.6], [[6, 7]], 0.2),  # four never had a gradient: their absence tells nothing
        ([0, 0, 0, 0, 0, 0, 0, 4], [2.0], [[7]], 0.5),
        ([8, 7, 6, 5, 4, 3, 2, 1], [0.0, 2.1], [[4, 5, 6, 7], [2, 3, 4, 5, 6, 7]], 0.1),  # no token met the first four
        ([0] * 8, [0.3], [[]], 1),
    ],
)
def test_absence_is_scaled_to_what_was_felt(known, absent, measured, gone, scale):
    layer = find_moe_layers(known[0])[0]
    weights = {name: tensor.clone() for name, tensor in known[0].state_dict().items()}
    costs = {p: torch.tensor([absent, [1] * 8], dtype=torch.float64).T / 2 for p in ("gate_up_proj", "down_proj")}
    calibration = Measured(layer, *measured)
    calibrate_dropping(layer, costs, 0, calibration)
    assert calibration.gone == gone
    for of in costs.values():
        assert of[:, 0].tolist() == pytest.approx([scale * cost / 2 for cost in absent])
        assert of[:, 1].tolist() == [0.5] * 8
    assert all(torch.equal(tensor, weights[name]) for name, tensor in known[0].state_dict().items())


@pytest.mark.slow
def test_another_budget_leaves_something_else_over(known):
    model, given, _ = known
    plan = allocate(model, bits=(0, 1, 2), average_bits=0.8, **given)
    left = {budget: replan(plan, average_bits=budget) for budget in (0.8, 0.99, 2)}
    assert {key: of.notes.get("left_over", 0.0) for key, of in left.items()} == {
        key: pytest.approx(key - of.average_bits, abs=1e-4) for key, of in left.items()
    }
    assert "left_over" not in left[2].notes
    data = plan.to_dict()
    del data["layers"][LAYER]["signals"]["tokens"]
    with pytest.raises(AllocationError, match="needs the tokens of expert statistics"):
        replan(PrecisionPlan.from_dict(data), average_bits=1)


def test_a_proven_choice_has_no_gap(monkeypatch):
    costs, sizes = np.array([[4.0, 1.0, 0.0]] * 2), np.array([[0, 2, 4]] * 2)
    given = Choice(np.array([1, 1]), 2.0 - 1e-15, 0.3)  # as good up to rounding, with the bound of the relaxed problem
    monkeypatch.setattr(knapsack, "greedy", lambda *args: given)
    found = choose(costs, sizes, 4)
    assert (found.index.tolist(), found.gap) == ([1, 1], 0.0)
