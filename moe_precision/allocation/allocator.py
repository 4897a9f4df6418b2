"""From what is known of a model's experts and a budget to a precision plan.

`orders` has the paper's rule and the controls, `knapsack` the methods that know what each width costs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.moe_layers import CAVEATS, find_moe_layers, root_model
from ..plans.plan import LayerPlan, PrecisionPlan, check_group_size, model_type_of, stored_bits_per_weight
from ..recording.curvature import Curvature, as_curvature
from ..recording.router_norms import HistoryError, RouterNormHistory, router_norms
from .costs import Costs, expert_costs
from .from_checkpoint import costs_of_checkpoint, signals_of_checkpoint
from .knapsack import least_cost_bits
from .orders import (
    METHODS,
    ZETA,
    AllocationError,
    LayerSignals,
    bits_from_order,
    check_budget,
    check_levels,
    exact,
    rank_experts,
)

__all__ = [
    "ALL_METHODS",
    "COST_METHODS",
    "GRANULARITIES",
    "METHODS",
    "AllocationError",
    "allocate",
    "bits_from_order",
    "check_budget",
    "check_granularity",
    "levels_of",
    "rank_experts",
]

GRANULARITIES = ("expert", "expert+projection", "layer", "layer+projection")
COST_METHODS = ("weight_error", "curvature", "sensitivity")  # solve one knapsack over all layers
ALL_METHODS = (*METHODS, *COST_METHODS)
PLAN_METHODS = tuple(method for method in ALL_METHODS if method != "sensitivity")  # which `compare` alone measures


def levels_of(method: str, average_bits: float, bits: Sequence[int]) -> list[int]:
    """The levels a method chooses from, after checking its name and budget; ``uniform`` has its average alone.

    Raises:
        AllocationError: Unknown method, or a budget that the levels cannot meet.
        PlanError: A width that is not 1 to 8 or 16.
    """
    if method not in ALL_METHODS:
        raise AllocationError(f"unknown method {method!r}, expected one of {', '.join(ALL_METHODS)}")
    if method in COST_METHODS:
        return check_levels(average_bits, bits)
    if method == "uniform":
        if average_bits not in range(17):
            raise AllocationError(f"method 'uniform' gives all experts one width: average_bits={average_bits} is none")
        bits = [int(average_bits)]
    return check_budget(average_bits, bits)


def check_granularity(method: str, granularity: str) -> None:
    """Raises `AllocationError` for an unknown granularity, or one that a method which orders experts cannot have."""
    if granularity not in GRANULARITIES:
        raise AllocationError(f"unknown granularity {granularity!r}, expected one of {', '.join(GRANULARITIES)}")
    if method in METHODS and granularity != "expert":
        raise AllocationError(
            f"method {method!r} orders the experts of a layer: granularity={granularity!r} needs a method that knows "
            f"costs, one of {', '.join(COST_METHODS)}"
        )


def allocate(
    model: nn.Module | str | os.PathLike | None = None,
    history: RouterNormHistory | str | os.PathLike | None = None,
    method: str = "router_norm",
    average_bits: float = 2.5,
    bits: Sequence[int] = (2, 3),
    group_size: int = 128,
    seed: int = 0,
    router_pattern: str | None = None,
    expert_pattern: str | None = None,
    curvature: Curvature | str | os.PathLike | None = None,
    granularity: str = "expert",
    stored_bits: float | None = None,
    expert_gib: float | None = None,
) -> PrecisionPlan:
    """Makes a precision plan: a width for each expert.

    The paper's rule, its ablations and the controls order the experts of each layer and give every layer the same
    counts. ``weight_error`` and ``curvature`` know what each width would cost and minimise the sum over all layers.

    Args:
        model: The model, for its final router norms and its variances, or the folder of its checkpoint, which is read
            tensor by tensor without building the model; not needed if ``history`` holds them.
        history: Recorded router norms, the path of such a file, or the folder of the checkpoint that training started
            from: the change is measured from its first record, up to the model if there is one, else up to its last
            record. Without a history the final norm takes the place of the change, and the plan says
            ``"baseline": "none"``: its ranking then assumes equal norms at the start.
        method: A name from `ALL_METHODS`.
        average_bits: Nominal bits an expert may have on average.
        bits: The levels to choose from; any for a method that knows costs.
        group_size: Weights that share a scale and an offset, along the input dimension.
        seed: For ``method="random"``.
        router_pattern: As in `find_moe_layers`, where ``model`` needs it; a history brings its own.
        expert_pattern: The same for the experts.
        curvature: For ``method="curvature"``: `Curvature` or the path of its file.
        granularity: What shares a width: ``expert``, ``expert+projection``, ``layer`` or ``layer+projection``; all but
            ``expert`` need a method that knows costs.
        stored_bits: A budget with scales and offsets, in the place of ``average_bits``.
        expert_gib: The same as the size of all routed experts in the file, in GiB.

    Raises:
        AllocationError: Levels, average or method are out of range, or a norm is not finite.
        PlanError: The group size does not divide an expert's input width.
        HistoryError: The history is empty or of another model.
        MoELayerError: The model has no Mixture-of-Experts layer.
        CheckpointError: A checkpoint folder is incomplete or damaged.
        StreamingError: A checkpoint cannot be read tensor by tensor; load it and give the model.
    """
    if stored_bits is not None and expert_gib is not None:
        raise AllocationError(f"stored_bits={stored_bits} and expert_gib={expert_gib} are two budgets; give one")
    in_bytes = stored_bits is not None or expert_gib is not None
    levels = levels_of(method, max(bits) if in_bytes else average_bits, bits)
    if stored_bits is not None:
        average_bits = _nominal(method, stored_bits, levels, group_size)
    check_granularity(method, granularity)
    if method in COST_METHODS:
        if method == "sensitivity":
            raise AllocationError("method 'sensitivity' needs measured costs, as moe-precision compare takes them")
        if model is None:
            raise AllocationError(f"method {method!r} measures what each width costs: give the model or its checkpoint")
        if method == "curvature" and curvature is None:
            raise AllocationError("method 'curvature' needs curvature, which RouterNormMonitor writes beside the plan")
    given = {"router_pattern": router_pattern, "expert_pattern": expert_pattern}
    patterns = {key: pattern for key, pattern in given.items() if pattern is not None}
    settings: dict[str, Any] = {} if expert_gib is None else {"expert_gib": expert_gib}
    for key, source in (("initial", history), ("final", model)):
        if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
            settings[key] = os.path.basename(os.path.abspath(source))
    if isinstance(history, (str, os.PathLike)):
        is_folder = os.path.isdir(history)
        history = signals_of_checkpoint(history, False, patterns) if is_folder else RouterNormHistory.load(history)
    if history is not None and not history.steps:
        raise HistoryError("the history holds no record")
    if model is not None:
        patterns = patterns or (history.patterns if history is not None else {})
        final = (
            _measured(model, patterns) if isinstance(model, nn.Module) else signals_of_checkpoint(model, True, patterns)
        )
        if history is not None and history.layers != final.layers:
            raise HistoryError(
                f"the history is of another model: it has layers {list(history.layers)}, "
                f"the model has {list(final.layers)}, or their shapes differ"
            )
    elif history is None:
        raise AllocationError("allocate needs a model, a history, or both")
    elif len(history.steps) < 2:
        raise HistoryError("the history holds the baseline alone: no training step was recorded")
    else:
        final = history

    broken = final.not_finite() or (history.not_finite() if history is not None else None)
    if broken:
        raise AllocationError(f"{broken}: the weights are damaged or training has diverged, no plan can be made")

    for name, shape in final.layers.items():
        check_group_size(group_size, name, shape.projections)
    if expert_gib is not None:
        weights = sum(shape.expert_size * shape.num_experts for shape in final.layers.values())
        stored_bits = expert_gib * 2**33 / weights
        try:
            average_bits = _nominal(method, stored_bits, levels, group_size)
        except AllocationError as error:
            raise AllocationError(f"{expert_gib} GiB for {weights} expert weights: {error}") from error
    if stored_bits is not None:
        settings["stored_bits"] = stored_bits
    costs = None
    if method in COST_METHODS:
        weighed = None
        if method == "curvature":
            assert curvature is not None
            weighed = as_curvature(curvature)
            weighed.check_layers(final.layers)
            weighed.check_router_norms(final.last)
        if isinstance(model, nn.Module):
            costs = expert_costs(find_moe_layers(model, **final.patterns), levels, group_size, weighed)
        else:
            assert model is not None
            costs = costs_of_checkpoint(model, levels, group_size, weighed, final.patterns)
    plan = plan_of_signals(
        final, history, method, average_bits, levels, group_size, seed, granularity, stored_bits, costs
    )
    last_step = None if history is None or model is not None else history.steps[-1]
    return replace(plan, settings=settings | plan.settings, last_step=last_step)


def plan_of_signals(
    final: RouterNormHistory,
    baseline: RouterNormHistory | None,
    method: str,
    average_bits: float,
    levels: Sequence[int],
    group_size: int,
    seed: int = 0,
    granularity: str = "expert",
    stored_bits: float | None = None,
    costs: Costs | None = None,
    zeta: float = ZETA,
) -> PrecisionPlan:
    """The part of `allocate` behind all measurements: from signals to a plan.

    Args:
        final: Its last record and variances are those of the trained model.
        baseline: Its first record is the baseline; its loads, else those of ``final``, serve ``load``. None if unknown.
        method: As in `allocate`.
        average_bits: Nominal budget.
        levels: Sorted widths.
        group_size: Weights that share a scale and an offset.
        seed: For ``random``.
        granularity: As in `allocate`.
        stored_bits: Budget with scales and offsets, in the place of ``average_bits``; for methods that know costs.
        costs: What each level costs, for the methods that know costs.
        zeta: Of the paper's reorder rule.

    Raises:
        AllocationError: A signal that the method reads is missing, or the budget is out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    first_norms = None if baseline is None else baseline.first
    counted = final.loads if baseline is None else baseline.loads or final.loads
    loads = counted.get("training") or counted.get("validation") or {}
    settings: dict[str, Any] = {"average_bits": average_bits, "bits": list(levels)}
    plans: dict[str, LayerPlan] = {}
    if method in COST_METHODS:
        if costs is None:
            raise AllocationError(f"method {method!r} needs what each width costs")
        least = least_cost_bits(final.layers, costs, levels, group_size, granularity, average_bits, stored_bits)
        settings |= {"granularity": granularity, "predicted_cost": _rounded(least.cost), "gap": _rounded(least.gap)}
        if least.indifferent:
            settings["without_gradient"] = least.indifferent
            warnings.warn(
                f"for {least.indifferent} of the choices all widths cost the same, as for experts that never had a "
                "gradient: they get the lowest width, and what others leave over; the plan says so",
                stacklevel=4,
            )
    for name, shape in final.layers.items():
        last, variance = final.last[name], final.max_variance.get(name)
        load = loads[name][0] if name in loads else None
        norm = last if first_norms is None else last - first_norms[name]
        order: list[int] = []
        signals = {"final_router_norm" if first_norms is None else "router_norm_change": _readable(norm)}
        if variance is not None:
            signals["max_variance"] = _readable(variance)
        if costs is not None:
            projection_bits = least.bits[name]
            for projection, of_projection in costs[name].items():
                for column, width in enumerate(levels):
                    signals[f"{method} of {projection} at {width} bits"] = _readable(of_projection[:, column])
        else:
            try:
                order = METHODS[method](LayerSignals(norm, last, variance, load, zeta), generator)
            except AllocationError as error:
                raise AllocationError(f"layer {name!r}: {error}") from error
            widths = bits_from_order(order, average_bits, levels)
            projection_bits = {projection: list(widths) for projection in shape.projections}
            if load is not None and method in ("load", "least_load"):
                signals["expert_load"] = _readable(load)
        router_norms_of = {} if first_norms is None else {"first": _readable(first_norms[name])}
        plans[name] = LayerPlan(
            shape=shape,
            projection_bits=projection_bits,
            order=order,
            router_norms=router_norms_of | {"last": _readable(last)},
            signals=signals,
        )
    settings |= final.patterns
    if method in ("router_norm", "final_norm", "reversed"):
        settings["zeta"] = zeta
    if method in ("router_norm", "norm_only", "reversed"):
        settings |= _reservations(final, baseline)
    if method == "random":
        settings["seed"] = seed
    plan = PrecisionPlan(
        model_type=final.model_type,
        layers=plans,
        group_size=group_size,
        asked_average_bits=average_bits,
        method=method,
        settings=settings,
        baseline_step=None if baseline is None else baseline.steps[0],
    )
    return plan if stored_bits is None else replace(plan, asked_average_bits=round(plan.average_bits, 6))


def _nominal(method: str, stored_bits: float, levels: Sequence[int], group_size: int) -> float:
    """The average width that a budget with scales and offsets leaves, which are the same for every width but 16.

    Raises:
        AllocationError: The levels do not reach around it.
    """
    lowest, highest = (stored_bits_per_weight(width, group_size) for width in (levels[0], levels[-1]))
    if not lowest <= exact(stored_bits) <= highest:
        raise AllocationError(
            f"stored_bits={stored_bits} is outside of what the levels {list(levels)} take with scales and offsets, "
            f"{lowest:g} to {highest:g}; give levels around it"
        )
    if levels[-1] == 16 and method in METHODS:
        raise AllocationError(
            f"method {method!r} counts nominal bits, and experts at 16 bits have no scales: give average_bits, or a "
            f"method that knows costs, one of {', '.join(COST_METHODS)}"
        )
    return min(max(float(exact(stored_bits)) - stored_bits_per_weight(0, group_size), levels[0]), levels[-1])


def _reservations(final: RouterNormHistory, history: RouterNormHistory | None) -> dict[str, Any]:
    """What an order by router norms rests on that a reader of the plan must know; each is warned of, too."""
    found: dict[str, Any] = {}

    def say(key: str, value: Any, text: str) -> None:
        found[key] = value
        warnings.warn(text + "; the plan says so", stacklevel=5)

    if history is None:
        spreads = sorted(float((n.max() - n.min()) / n.mean().clamp(min=1e-30)) for n in final.last.values())
        spread = {"median": _rounded(spreads[len(spreads) // 2]), "largest": _rounded(spreads[-1])}
        say(
            "assumes_equal_initial_norms",
            {"spread_of_final_norms": spread},
            "no baseline is known: experts are ranked by their final router norm, as if all norms of a layer had been "
            f"equal before training. Within a layer the final norms spread over {spread['median']:.1%} of their mean "
            f"(median layer) to {spread['largest']:.1%} (largest)",
        )
    else:
        unmoved = [name for name, norms in final.last.items() if torch.equal(norms, history.first[name])]
        if unmoved:
            say(
                "layers_without_change",
                unmoved,
                f"the routers of {len(unmoved)} layers did not change at all, the first is {unmoved[0]!r}: are they "
                "frozen? Their experts are ranked by variance and index alone",
            )
    if not final.max_variance:
        say(
            "max_variance",
            "not measured",
            "the maximum intra-neuron variances are not known (training ended before they were measured): experts are "
            "ranked by the change of router norm alone. Give the checkpoint too to have them measured",
        )
    if final.caveats:
        say(
            "router_caveats",
            dict(final.caveats),
            f"{caveat_text(final.caveats)}; their experts are ranked all the same",
        )
    return found


def caveat_text(caveats: dict[str, str]) -> str:
    """One sentence a kind of router whose norm is not what it is elsewhere."""
    kinds = dict.fromkeys(caveats.values())
    of_kind = {kind: [name for name, one in caveats.items() if one == kind] for kind in kinds}
    return "; ".join(
        f"the router of {len(names)} layers ({names[0]!r}, ...) {CAVEATS[kind]}" for kind, names in of_kind.items()
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _measured(model: nn.Module, patterns: dict[str, Any]) -> RouterNormHistory:
    """The model's norms and variances as they are now."""
    layers = find_moe_layers(model, **patterns)
    final = RouterNormHistory.of(layers, model_type_of(root_model(model)), patterns)
    final.record(0, router_norms(layers))
    final.measure_variance(layers)
    return final


def _readable(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]  # what a float32 holds, and no more digits
