"""What each width costs according to every method that knows costs, on a model that simulates the widths."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..allocation.calibration import calibration_on
from ..allocation.costs import Costs
from ..plans.methods import DROPPING_METHODS, MethodName, reads
from ..plans.numbers import AllocationError
from ..plans.widths import DROPPED
from ..recording.curvature import Curvature
from .evaluation import document_losses
from .simulation import SimulatedExperts


def levels_of(method: str, levels: Sequence[int]) -> list[int]:
    """Those that a method can choose from: all, or without 0."""
    return [level for level in levels if level != DROPPED or method in DROPPING_METHODS]


def method_costs(
    simulated: SimulatedExperts,
    levels: Sequence[int],
    methods: Sequence[MethodName],
    curvature: Curvature | None,
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    skipped: list[str],
) -> tuple[dict[str, Costs], int]:
    """Costs at the levels that each method can choose from, calibrated as in a run that has batches.

    Args:
        simulated: The experts of the model.
        levels: Widths, ascending.
        methods: Of the comparison; those that know no costs are left out.
        curvature: What methods by curvature read.
        model: Whose experts are simulated.
        batches: On which ``sensitivity`` is measured, and costs are calibrated.
        skipped: Gets what cannot be measured, with the reason.

    Returns:
        Costs by method, and the number of tokens on which they were calibrated; 0 if they were not.
    """
    found: dict[str, Costs] = {}
    if "weight_error" in methods:
        found["weight_error"] = simulated.costs(levels_of("weight_error", levels), None)
    for method in (one for one in methods if reads(one, "curvature")):
        if curvature is None:
            skipped.append(f"{method}: no curvature is given")
        elif not reads(method, "statistics"):
            found[method] = found.get("curvature") or simulated.costs(levels_of(method, levels), curvature)
        elif simulated.statistics is None:
            skipped.append(f"{method}: no statistics are given")
        else:
            found[method] = simulated.costs(levels_of(method, levels), curvature, together=True)
    tokens = _calibrate(simulated, levels, found, model, batches, skipped) if found and batches else 0
    if "sensitivity" in methods and not batches:
        skipped.append("sensitivity: no calibration batches are given")
    elif "sensitivity" in methods:
        found["sensitivity"] = simulated.sensitivity(
            levels_of("sensitivity", levels), lambda: float(document_losses(model, batches)[0].double().mean())
        )
    return found, tokens


def _calibrate(
    simulated: SimulatedExperts,
    levels: Sequence[int],
    costs: dict[str, Costs],
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    skipped: list[str],
) -> int:
    """Scales costs to measured divergences, in place; the number of tokens, 0 if that cannot be done."""
    simulated.restore()
    try:
        calibration = calibration_on(model, batches)
    except AllocationError as error:
        skipped.append(f"costs are not calibrated: {error}")
        return 0
    measured = simulated.divergences(levels, calibration)
    for method, found in costs.items():
        costs[method] = simulated.calibrated(found, levels_of(method, levels), measured, calibration)
    return calibration.tokens
