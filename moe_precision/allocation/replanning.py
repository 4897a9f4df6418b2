"""The same plan at another budget, from the costs that it holds: nothing is measured again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch

from ..plans.notes import PlanNotes
from ..plans.numbers import AllocationError
from ..plans.plan import PrecisionPlan
from .knapsack import least_cost_bits
from .planning import noting_left_over, rounded


def replan(
    plan: PrecisionPlan,
    *,
    average_bits: float | None = None,
    stored_bits: float | None = None,
    expert_gib: float | None = None,
    total_gib: float | None = None,
    rest_gib: float | None = None,
) -> PrecisionPlan:
    """Solves a plan's knapsack again at another budget, in an instant; levels and granularity stay.

    Args:
        plan: Made by a method that knows costs.
        average_bits: Budget in nominal bits per expert weight.
        stored_bits: Budget with scales and offsets included, instead.
        expert_gib: Budget as the size of all routed experts in the file, in GiB, instead.
        total_gib: Budget as the size of the whole model in the file, in GiB, instead.
        rest_gib: What everything but the routed experts takes, for ``total_gib``; by default what the plan was made
            with, if that was by ``total_gib`` too.

    Raises:
        AllocationError: The plan holds no costs, not one budget is given, or it is out of range.

    Example:
        >>> plan = allocate(model, method="weight_error", average_bits=2.5, bits=(2, 3, 4), group_size=64)
        >>> replan(plan, average_bits=3).average_bits
        3.0
    """
    if plan.settings is None or not all(layer.costs for layer in plan.layers.values()):
        raise AllocationError(f"replan needs a plan that holds costs; method {plan.method!r} knows none: make it anew")
    if sum(budget is not None for budget in (average_bits, stored_bits, expert_gib, total_gib)) != 1:
        raise AllocationError("give one of average_bits, stored_bits, expert_gib and total_gib")
    if total_gib is not None and rest_gib is None:
        rest_gib = plan.settings.rest_gib
    settings = replace(
        plan.settings,
        average_bits=average_bits,
        stored_bits=stored_bits,
        expert_gib=expert_gib,
        total_gib=total_gib,
        rest_gib=rest_gib,
    )
    shapes = {name: layer.shape for name, layer in plan.layers.items()}
    settings.check_fits(shapes)
    costs = {
        name: {
            projection: torch.tensor([by[bits] for bits in settings.levels], dtype=torch.float64).T.contiguous()
            for projection, by in layer.costs.items()
        }
        for name, layer in plan.layers.items()
    }
    tokens = {name: layer.signals["tokens"] for name, layer in plan.layers.items() if "tokens" in layer.signals}
    least = least_cost_bits(shapes, costs, settings, tokens or None)
    layers = copy.deepcopy(plan.layers)  # so that editing one plan never changes another
    layers = {name: replace(layer, projection_bits=least.bits[name]) for name, layer in layers.items()}
    notes: dict[str, Any] = {**plan.notes, "predicted_cost": rounded(least.cost), "gap": rounded(least.gap)}
    notes = {key: value for key, value in notes.items() if key not in ("edited", "left_over")}
    return noting_left_over(replace(plan, settings=settings, layers=layers, notes=cast(PlanNotes, notes)), settings)
