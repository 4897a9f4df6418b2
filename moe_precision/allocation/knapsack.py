"""Widths of least total cost under one budget for all layers: a multiple-choice knapsack, solved exactly by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

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


@dataclass(frozen=True)
class Cap:
    """At most ``most`` of some units take a choice: experts of a layer that are dropped.

    Attributes:
        units: Indices of the units, ``(N,)``.
        choice: Index of the choice.
        most: How many of them may take it.
    """

    units: np.ndarray
    choice: int
    most: int


def choose(
    costs: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    allowed: np.ndarray | None = None,
    caps: Sequence[Cap] = (),
) -> Choice:
    """Chooses one of ``C`` choices for each of ``U`` units, at the least total cost within the budget.

    Args:
        costs: ``(U, C)`` finite.
        sizes: ``(U, C)`` whole numbers, in bits.
        budget: Largest total size, in the same unit; never exceeded.
        allowed: ``(U, C)`` bool, at least one choice of each unit; None allows all.
        caps: On some choices.

    Raises:
        ValueError: The smallest sizes together exceed the budget.
    """
    allowed = np.ones(costs.shape, dtype=bool) if allowed is None else allowed
    capped = _within_caps(costs, allowed, caps)
    smallest = int(np.where(capped, sizes, sizes.max()).min(axis=1).sum())
    if smallest > budget:
        raise ValueError(f"the smallest choices take {smallest} bits together, the budget is {budget}")
    divisor = math.gcd(*sizes.ravel().tolist())
    sizes, budget = sizes // divisor, budget // divisor  # small whole numbers, which the solver's tolerance cannot blur
    scale = np.abs(costs).mean() or 1.0
    units, choices = costs.shape
    variables = np.arange(units * choices)
    rows = [variables // choices, np.full(units * choices, units)]
    columns, values = [variables, variables], [np.ones(units * choices), sizes.ravel()]
    for row, cap in enumerate(caps, start=units + 1):
        rows.append(np.full(len(cap.units), row))
        columns.append(cap.units * choices + cap.choice)
        values.append(np.ones(len(cap.units)))
    places = np.concatenate(rows), np.concatenate(columns)
    matrix = coo_array((np.concatenate(values), places), shape=(units + 1 + len(caps), units * choices)).tocsr()
    upper = np.concatenate([np.ones(units), [float(budget)], [float(cap.most) for cap in caps]])
    lower = np.concatenate([np.ones(units), np.zeros(1 + len(caps))])
    found = milp(
        (costs / scale).ravel(),
        integrality=np.ones(units * choices),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=LinearConstraint(matrix, lower, upper),
        options={"time_limit": _TIME_LIMIT, "mip_rel_gap": _RELATIVE_GAP},
    )
    fallback = greedy(costs, sizes, budget, capped)
    if found.x is None:
        return fallback
    index = found.x.reshape(units, choices).argmax(axis=1)
    cost = float(np.take_along_axis(costs, index[:, None], axis=1).sum())
    within = int(np.take_along_axis(sizes, index[:, None], axis=1).sum()) <= budget
    within &= all(int((index[cap.units] == cap.choice).sum()) <= cap.most for cap in caps)
    if not within:
        return fallback
    gap = float(found.mip_gap or 0.0)
    if cost > fallback.cost:  # by rounding, or after the time limit: the gap of a better choice is no larger
        return replace(fallback, gap=min(gap, fallback.gap))
    return Choice(index, cost, gap)


def _within_caps(costs: np.ndarray, allowed: np.ndarray, caps: Sequence[Cap]) -> np.ndarray:
    """What is allowed, with a capped choice left to the units that it costs least: any choice is within the caps."""
    allowed = allowed.copy()
    for cap in caps:
        able = cap.units[allowed[cap.units, cap.choice]]
        by_cost = able[np.argsort(costs[able, cap.choice], kind="stable")]
        allowed[by_cost[cap.most :], cap.choice] = False
    return allowed


def greedy(costs: np.ndarray, sizes: np.ndarray, budget: int, allowed: np.ndarray | None = None) -> Choice:
    """Chooses along the lower convex hull of each unit, steepest step first; the gap is to the relaxed problem.

    Arguments as in `choose`.
    """
    allowed = np.ones(costs.shape, dtype=bool) if allowed is None else allowed
    index = np.where(allowed, sizes, sizes.max() + 1).argmin(axis=1)
    steps: list[tuple[float, int, int, int]] = []  # (cost saved per bit, unit, from, to)
    for unit in range(len(costs)):
        current = int(index[unit])
        while True:
            gain, more = costs[unit, current] - costs[unit], sizes[unit] - sizes[unit, current]
            slopes = np.where((more > 0) & (gain > 0) & allowed[unit], gain / np.maximum(more, 1), 0.0)
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


def least_cost_bits(
    layers: Mapping[str, LayerShape],
    costs: Costs,
    settings: PlanSettings,
    tokens: Mapping[str, Sequence[float]] | None = None,
) -> LeastCost:
    """Gives every unit of a granularity a width so that the total cost is least within one budget for all layers.

    Args:
        layers: Layer name -> shape.
        costs: As `expert_costs` returns them, for the levels of the settings.
        settings: Levels, budget, group size, and what shares a width. With 0 among the levels an expert is one unit
            whose choices are widths for its matrices, or nothing of any.
        tokens: Layer name -> tokens that each expert was seen with; needed where experts may be dropped.

    Raises:
        AllocationError: The budget is too small.
    """
    units = _units(layers, settings)
    choices = {k: _choices(settings, k) for k in {len(matrices) for matrices in units}}
    widest = max(map(len, choices.values()))
    unit_costs, sizes = np.zeros((len(units), widest)), np.zeros((len(units), widest), dtype=np.int64)
    allowed = np.zeros((len(units), widest), dtype=bool)
    stored_bits = settings.stored_budget(layers)
    size_of = [
        bits if stored_bits is None else stored_bits_per_weight(bits, settings.group_size) for bits in settings.levels
    ]
    total = 0
    for row, matrices in enumerate(units):
        of = choices[len(matrices)]  # (choices, matrices) level indices
        allowed[row, : len(of)] = True
        for column, (name, projection, expert) in enumerate(matrices):
            out, inp = layers[name].projections[projection]
            levels = of[:, column]
            unit_costs[row, : len(of)] += costs[name][projection][expert].numpy()[levels]
            sizes[row, : len(of)] += np.array([round(size * out * inp) for size in size_of])[levels]
            total += out * inp
    if not np.isfinite(unit_costs).all():
        raise AllocationError("a cost is not finite: the weights or the curvature are damaged")
    possible = np.where(allowed, unit_costs, unit_costs[:, :1])
    alike = possible.max(axis=1) == possible.min(axis=1)  # experts that never had a gradient
    if alike.all():
        raise AllocationError("all widths cost the same for every expert: there is nothing to choose by")
    caps = _caps(layers, units, alike, allowed, settings, tokens) if settings.may_drop else []
    asked = settings.nominal_bits(layers) if stored_bits is None else stored_bits
    try:
        choice = _choose_where_it_matters(unit_costs, sizes, alike, int(exact(asked) * total), allowed, caps)
    except ValueError as error:
        kept = f", of which max_dropped={settings.max_dropped} and min_tokens={settings.min_tokens} forbid some 0s"
        raise AllocationError(
            f"the levels {list(settings.levels)}{kept if settings.may_drop else ''} do not fit the budget: {error}"
        ) from error
    bits = {name: {p: [0] * shape.num_experts for p in shape.projections} for name, shape in layers.items()}
    for index, matrices in zip(choice.index, units, strict=True):
        for level, (name, projection, expert) in zip(choices[len(matrices)][index], matrices, strict=True):
            bits[name][projection][expert] = settings.levels[level]
    return LeastCost(bits, choice.cost, choice.gap, int(alike.sum()))


def _units(layers: Mapping[str, LayerShape], settings: PlanSettings) -> list[list[tuple[str, str, int]]]:
    """What one choice is made for: each a list of matrices (layer, projection, expert)."""
    granularity = settings.granularity or "expert"
    by_expert = granularity.startswith("expert")
    by_projection = granularity.endswith("+projection") and not settings.may_drop
    units: dict[tuple[str, str, int], list[tuple[str, str, int]]] = {}
    for name, shape in layers.items():
        for projection in shape.projections:
            for expert in range(shape.num_experts):
                unit = (name, projection if by_projection else "", expert if by_expert else -1)
                units.setdefault(unit, []).append((name, projection, expert))
    return list(units.values())


def _choices(settings: PlanSettings, matrices: int) -> np.ndarray:
    """Level indices of each choice of a unit, ``(choices, matrices)``; the first drops it, where that is a choice."""
    levels = range(len(settings.levels))
    if settings.may_drop and settings.granularity == "expert+projection":
        return np.array([(0,) * matrices, *product(levels[1:], repeat=matrices)])
    return np.array([(level,) * matrices for level in levels])


def _caps(
    layers: Mapping[str, LayerShape],
    units: list[list[tuple[str, str, int]]],
    alike: np.ndarray,
    allowed: np.ndarray,
    settings: PlanSettings,
    tokens: Mapping[str, Sequence[float]] | None,
) -> list[Cap]:
    """How many experts of each layer may be dropped; ``allowed`` then forbids it for those that were hardly seen."""
    if tokens is None or not tokens.keys() >= layers.keys():
        raise AllocationError("0 bits drop an expert, which needs the tokens of expert statistics")
    of_layer: dict[str, list[int]] = {name: [] for name in layers}
    for row, matrices in enumerate(units):
        name, _, expert = matrices[0]
        of_layer[name].append(row)
        if alike[row] or tokens[name][expert] < settings.min_tokens:  # no evidence is no evidence of no use
            allowed[row, 0] = False
    caps = []
    for name, rows in of_layer.items():
        experts = layers[name].num_experts
        most = min(int(exact(settings.max_dropped) * experts), experts - (layers[name].top_k or 1))
        caps.append(Cap(np.array(rows), 0, most))
    return caps


def _choose_where_it_matters(
    costs: np.ndarray, sizes: np.ndarray, alike: np.ndarray, budget: int, allowed: np.ndarray, caps: Sequence[Cap]
) -> Choice:
    """`choose` for units that differ; the others get their smallest size, and then, in order, what is left over."""
    index = np.where(allowed, sizes, sizes.max() + 1).argmin(axis=1)
    rest = budget - int(np.take_along_axis(sizes, index[:, None], axis=1)[alike].sum())
    place = np.cumsum(~alike) - 1  # of a unit among those that differ
    caps = [Cap(place[cap.units[~alike[cap.units]]], cap.choice, cap.most) for cap in caps]
    choice = choose(costs[~alike], sizes[~alike], rest, allowed[~alike], caps)
    index[~alike] = choice.index
    left = budget - int(np.take_along_axis(sizes, index[:, None], axis=1).sum())
    for unit in np.flatnonzero(alike):
        more = sizes[unit] - sizes[unit, index[unit]]
        fitting = np.where((more <= left) & allowed[unit], more, -1)
        index[unit] = int(fitting.argmax())
        left -= int(fitting.max())
    return Choice(index, choice.cost + float(costs[alike, 0].sum()), choice.gap)
