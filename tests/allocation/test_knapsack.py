"""The knapsack against brute force over all choices, and budgets that are never exceeded."""

import itertools

import numpy as np
import pytest
import torch

from moe_precision import AllocationError
from moe_precision.allocation.knapsack import choose, greedy, least_cost_bits
from moe_precision.layers.shape import LayerShape
from moe_precision.plans.settings import PlanSettings


def best_of_all(costs, sizes, budget):
    units = range(len(costs))
    totals = [
        sum(costs[u, c] for u, c in zip(units, choice, strict=True))
        for choice in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sum(sizes[u, c] for u, c in zip(units, choice, strict=True)) <= budget
    ]
    return min(totals)


@pytest.mark.parametrize("seed", range(6))
def test_the_least_cost_of_all_choices(seed):
    generator = np.random.default_rng(seed)
    costs = generator.random((6, 4)) * 10.0 ** generator.integers(-9, 0, (6, 1))  # over many orders of magnitude
    sizes = generator.integers(1, 40, (6, 4)) * 64
    budget = int(sizes.min(axis=1).sum() * 1.7)
    choice = choose(costs, sizes, budget)
    taken = np.take_along_axis(sizes, choice.index[:, None], axis=1).sum()
    assert taken <= budget
    assert choice.cost == pytest.approx(best_of_all(costs, sizes, budget), rel=1e-5)
    fallback = greedy(costs, sizes, budget)
    assert np.take_along_axis(sizes, fallback.index[:, None], axis=1).sum() <= budget
    assert choice.cost <= fallback.cost <= choice.cost * (1 + fallback.gap) * (1 + 1e-5)


def test_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="smallest choices take 6 bits together, the budget is 5"):
        choose(np.ones((2, 2)), np.array([[3, 4], [3, 4]]), 5)


@pytest.mark.slow
def test_a_large_problem_is_close_to_its_bound():
    generator = np.random.default_rng(0)
    costs = generator.random((2048, 1)) * 4.0 ** -np.arange(1, 6) * generator.uniform(0.5, 1.5, (2048, 5))
    sizes = np.tile(np.arange(1, 6) * 1000, (2048, 1))
    choice = choose(costs, sizes, 2048 * 2500)
    relaxed = greedy(costs, sizes, 2048 * 2500)
    bound = relaxed.cost / (1 + relaxed.gap)
    assert bound <= choice.cost * (1 + 1e-9)
    assert choice.cost <= bound * 1.001


LAYERS = {
    "a": LayerShape("a.gate.weight", 2, {"up": (64, 32), "down": (32, 64)}),
    "b": LayerShape("b.gate.weight", 3, {"up": (64, 32), "down": (32, 64)}),
}
# quantizing costs by width 2 and 3; expert 1 of layer b is by far the most sensitive, in its down projection
COSTS = {
    "a": {"up": torch.tensor([[2.0, 1], [2, 1]]), "down": torch.tensor([[2.0, 1], [2, 1]])},
    "b": {"up": torch.tensor([[2.0, 1], [2, 1], [2, 1]]), "down": torch.tensor([[2.0, 1], [90, 1], [2, 1]])},
}


def asked(levels, group_size, granularity, **budget):
    """Settings of a method that knows costs."""
    return PlanSettings(method="weight_error", bits=levels, group_size=group_size, granularity=granularity, **budget)


@pytest.mark.parametrize(
    ("granularity", "average", "at_three"),
    [
        ("expert+projection", 2.1, [("b", "down", 1)]),
        ("expert", 2.2, [("b", "up", 1), ("b", "down", 1)]),
        ("layer+projection", 2.3, [("b", "down", 0), ("b", "down", 1), ("b", "down", 2)]),
        ("layer", 2.6, [("b", p, e) for p in ("up", "down") for e in range(3)]),
    ],
)
def test_granularities(granularity, average, at_three):
    found = least_cost_bits(LAYERS, COSTS, asked([2, 3], 32, granularity, average_bits=average))
    threes = {(n, p, e) for n, of in found.bits.items() for p, bits in of.items() for e, b in enumerate(bits) if b == 3}
    assert threes == set(at_three)


def test_a_budget_of_stored_bits_counts_scales_and_offsets():
    # group 32: a width of b takes b + 0.5625 bits; 2.6625 stored leave 0.1 above all at 2 bits, one matrix of ten
    found = least_cost_bits(LAYERS, COSTS, asked([2, 3], 32, "expert+projection", stored_bits=2.6625))
    assert found.bits["b"]["down"] == [2, 3, 2]
    assert sum(bits.count(3) for of in found.bits.values() for bits in of.values()) == 1
    with pytest.raises(AllocationError, match="outside what the levels"):
        least_cost_bits(LAYERS, COSTS, asked([2, 3], 32, "expert", stored_bits=2.5))


def test_costs_that_are_not_finite():
    broken = {"a": COSTS["a"], "b": {**COSTS["b"], "up": torch.full((3, 2), float("nan"))}}
    with pytest.raises(AllocationError, match="not finite"):
        least_cost_bits(LAYERS, broken, asked([2, 3], 32, "expert", average_bits=2.5))


def test_units_that_do_not_care_get_the_lowest_width_and_what_is_left():
    costs = {n: {p: c.clone() for p, c in of.items()} for n, of in COSTS.items()}
    for projection in ("up", "down"):
        costs["a"][projection][:] = 0.0  # layer a never had a gradient
    found = least_cost_bits(LAYERS, costs, asked([2, 3], 32, "expert", average_bits=2.6))
    assert found.bits["b"]["up"] == [3, 3, 3]  # all that others can use
    assert found.bits["a"]["up"] == [2, 2]
    assert found.indifferent == 2
    found = least_cost_bits(LAYERS, costs, asked([2, 3], 32, "expert", average_bits=2.8))
    assert found.bits["a"]["up"] == [3, 2]
    for projection in ("up", "down"):
        costs["b"][projection][:] = 1.0
    with pytest.raises(AllocationError, match="nothing to choose by"):
        least_cost_bits(LAYERS, costs, asked([2, 3], 32, "expert", average_bits=2.5))


@pytest.mark.parametrize(("group_size", "low"), [(24, 2), (40, 2), (48, 1), (88, 4)])
def test_a_budget_exactly_at_the_lowest_level(group_size, low):
    costs = {"a": {p: torch.tensor([[2.0, 1.0], [4.0, 1.0]]) for p in ("up", "down")}}
    layers = {"a": LayerShape("a.gate.weight", 2, {"up": (16, group_size * 4), "down": (32, group_size * 4)})}
    found = least_cost_bits(
        layers, costs, asked([low, low + 1], group_size, "expert", stored_bits=low + 18 / group_size)
    )
    assert found.bits["a"]["up"] == [low, low]
