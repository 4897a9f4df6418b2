"""Widths of least total cost under one budget for all layers: a multiple-choice knapsack, solved exactly by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..layers.shape import LayerShape
from ..plans.numbers import AllocationError, exact
from ..plans.settings import PlanSettings
from ..plans.widths import stored_bits_per_weight
from .costs import Costs

_TIME_LIMIT = 60.0  # seconds
_RELATIVE_GAP = 1e-5


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        index: Index of the choice of each unit, ``(units,)``.
        cost: Its total cost.
        gap: How far the cost may be above the best possible one, as a share of it; 0 where it is proven optimal.
    """

    index: np.ndarray
    cost: float
    gap: float


def choose(costs: np.ndarray, sizes: np.ndarray, budget: int) -> Choice:
    """Chooses one of ``C`` choices for each of ``U`` units, at the least total cost within the budget.

    Args:
        costs: ``(U, C)`` finite.
        sizes: ``(U, C)`` whole numbers, in bits.
        budget: Largest total size, in the same unit; never exceeded.

    Raises:
        ValueError: The smallest sizes together exceed the budget.
    """
    smallest = int(sizes.min(axis=1).sum())
    if smallest > budget:
        raise ValueError(f"the smallest choices take {smallest} bits together, the budget is {budget}")
    divisor = math.gcd(*sizes.ravel().tolist())
    sizes, budget = sizes // divisor, budget // divisor  # small whole numbers, which the solver's tolerance cannot blur
    scale = np.abs(costs).mean() or 1.0
    units, choices = costs.shape
    variables = np.arange(units * choices)
    rows = np.concatenate([variables // choices, np.full(units * choices, units)])
    values = np.concatenate([np.ones(units * choices), sizes.ravel()])
    matrix = coo_array((values, (rows, np.concatenate([variables, variables])))).tocsr()
    lower, upper = np.append(np.ones(units), 0.0), np.append(np.ones(units), float(budget))
    found = milp(
        (costs / scale).ravel(),
        integrality=np.ones(units * choices),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, lower, upper),
        options={"time_limit": _TIME_LIMIT, "mip_rel_gap": _RELATIVE_GAP},
    )
    fallback = greedy(costs, sizes, budget)
    if found.x is None:
        return fallback
    index = found.x.reshape(units, choices).argmax(axis=1)
    cost = float(np.take_along_axis(costs, index[:, None], axis=1).sum())
    within = int(np.take_along_axis(sizes, index[:, None], axis=1).sum()) <= budget
    if not within or cost > fallback.cost:
        return fallback
    return Choice(index, cost, float(found.mip_gap or 0.0))


def greedy(costs: np.ndarray, sizes: np.ndarray, budget: int) -> Choice:
    """Chooses along the lower convex hull of each unit, steepest step first; the gap is to the relaxed problem.

    Arguments as in `choose`.
    """
    index = sizes.argmin(axis=1)
    steps: list[tuple[float, int, int, int]] = []  # (cost saved per bit, unit, from, to)
    for unit in range(len(costs)):
        current = int(index[unit])
        while True:
            gain, more = costs[unit, current] - costs[unit], sizes[unit] - sizes[unit, current]
            slopes = np.where((more > 0) & (gain > 0), gain / np.maximum(more, 1), 0.0)
            following = int(slopes.argmax())
            if slopes[following] <= 0:
                break
            steps.append((float(slopes[following]), unit, current, following))
            current = following
    left = budget - int(np.take_along_axis(sizes, index[:, None], axis=1).sum())
    cost = float(np.take_along_axis(costs, index[:, None], axis=1).sum())
    bound, relaxed_left = cost, left
    stopped: set[int] = set()
    for slope, unit, before, after in sorted(steps, key=lambda step: -step[0]):
        more = int(sizes[unit, after] - sizes[unit, before])
        taken = min(more, relaxed_left)
        bound, relaxed_left = bound - slope * taken, relaxed_left - taken
        if unit in stopped or more > left:
            stopped.add(unit)  # later steps of a unit build on earlier ones
            continue
        index[unit], left, cost = after, left - more, cost - slope * more
    return Choice(index, cost, (cost - bound) / bound if bound > 0 else 0.0)


@dataclass(frozen=True)
class LeastCost:
    """Widths of every layer and projection, their total cost, and how far it may be from the best, as a share."""

    bits: dict[str, dict[str, list[int]]]
    cost: float
    gap: float
    indifferent: int = 0  # units for which all widths cost the same


def least_cost_bits(layers: Mapping[str, LayerShape], costs: Costs, settings: PlanSettings) -> LeastCost:
    """Gives every unit of a granularity a width so that the total cost is least within one budget for all layers.

    Args:
        layers: Layer name -> shape.
        costs: As `expert_costs` returns them, for the levels of the settings.
        settings: Levels, budget, group size, and what shares a width.

    Raises:
        AllocationError: The budget is too small.
    """
    levels, group_size, granularity = settings.levels, settings.group_size, settings.granularity or "expert"
    stored_bits = settings.stored_budget(layers)
    by_expert, by_projection = granularity.startswith("expert"), granularity.endswith("+projection")
    units: dict[tuple[str, str, int], list[tuple[str, str, int]]] = {}  # unit -> its matrices
    for name, shape in layers.items():
        for projection in shape.projections:
            for expert in range(shape.num_experts):
                unit = (name, projection if by_projection else "", expert if by_expert else -1)
                units.setdefault(unit, []).append((name, projection, expert))
    nominal = stored_bits is None
    size_of = [bits if nominal else stored_bits_per_weight(bits, group_size) for bits in levels]
    unit_costs = np.zeros((len(units), len(levels)))
    sizes = np.zeros((len(units), len(levels)), dtype=np.int64)
    total = 0
    for row, matrices in enumerate(units.values()):
        for name, projection, expert in matrices:
            out, inp = layers[name].projections[projection]
            unit_costs[row] += costs[name][projection][expert].numpy()
            sizes[row] += [round(size * out * inp) for size in size_of]
            total += out * inp
    if not np.isfinite(unit_costs).all():
        raise AllocationError("a cost is not finite: the weights or the curvature are damaged")
    alike = unit_costs.max(axis=1) == unit_costs.min(axis=1)  # experts that never had a gradient
    if alike.all():
        raise AllocationError("all widths cost the same for every expert: there is nothing to choose by")
    asked = settings.nominal_bits(layers) if stored_bits is None else stored_bits
    try:
        choice = _choose_where_it_matters(unit_costs, sizes, alike, int(exact(asked) * total))
    except ValueError as error:
        raise AllocationError(f"the levels {list(levels)} do not fit the budget: {error}") from error
    bits = {name: {p: [0] * shape.num_experts for p in shape.projections} for name, shape in layers.items()}
    for index, matrices in zip(choice.index, units.values(), strict=True):
        for name, projection, expert in matrices:
            bits[name][projection][expert] = levels[index]
    return LeastCost(bits, choice.cost, choice.gap, int(alike.sum()))


def _choose_where_it_matters(costs: np.ndarray, sizes: np.ndarray, alike: np.ndarray, budget: int) -> Choice:
    """`choose` for units that differ; the others get their smallest size, and then, in order, what is left over."""
    index = sizes.argmin(axis=1)
    rest = budget - int(sizes[alike].min(axis=1).sum() if alike.any() else 0)
    choice = choose(costs[~alike], sizes[~alike], rest)
    index[~alike] = choice.index
    left = budget - int(np.take_along_axis(sizes, index[:, None], axis=1).sum())
    for unit in np.flatnonzero(alike):
        more = sizes[unit] - sizes[unit, index[unit]]
        fitting = np.where(more <= left, more, -1)
        index[unit] = int(fitting.argmax())
        left -= int(fitting.max())
    return Choice(index, choice.cost + float(costs[alike].min(axis=1).sum() if alike.any() else 0.0), choice.gap)
