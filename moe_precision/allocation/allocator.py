"""Makes a precision plan from what is known of a model's experts and the settings that were asked for.

`orders` has the paper's rule and the controls, `knapsack` the methods that know what each width costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..autocast import without_autocast
from ..checkpoints.checkpoint import Checkpoint, opened
from ..layers.patterns import Patterns
from ..plans.methods import AUTO, METHODS, MethodName, chosen
from ..plans.notes import PlanNotes
from ..plans.numbers import AllocationError
from ..plans.plan import PrecisionPlan
from ..plans.settings import MAX_DROPPED, MIN_TOKENS, ZETA, PlanSettings
from ..plans.widths import Granularity
from ..recording.curvature import Curvature, as_curvature
from ..recording.history import HistoryError, RouterNormHistory
from ..recording.statistics import ExpertStatistics, as_statistics
from .calibration import Calibration, calibration_on
from .planning import plan_from_signals
from .snapshot import Snapshot
from .weights import LiveWeights, StoredWeights, Weights
from .whole_model import with_rest

Model = nn.Module | Checkpoint | str | os.PathLike[str]
History = RouterNormHistory | Checkpoint | str | os.PathLike[str]


def allocate(
    model: Model | None = None,
    history: History | None = None,
    *,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
    calibration: Iterable[Any] | None = None,
    method: MethodName = AUTO,
    average_bits: float | None = None,
    stored_bits: float | None = None,
    expert_gib: float | None = None,
    total_gib: float | None = None,
    rest_gib: float | None = None,
    bits: Sequence[int] | None = None,
    group_size: int = 128,
    granularity: Granularity | None = None,
    seed: int = 0,
    zeta: float = ZETA,
    max_dropped: float = MAX_DROPPED,
    min_tokens: int = MIN_TOKENS,
    router_pattern: str | None = None,
    expert_pattern: str | None = None,
    layout: str | None = None,
) -> PrecisionPlan:
    """Makes a precision plan: a width for each expert.

    The paper's rule, its ablations and the controls order the experts of each layer. Under a budget in nominal bits
    they give every layer the same counts, rounded down; under one in stored bits or bytes, what one layer leaves over
    goes on to the next. ``weight_error``, ``curvature`` and ``statistics`` know what each width would cost and minimize
    the sum over all layers.

    Args:
        model: The model, for its final router norms and whatever else the method reads, or the folder of its
            checkpoint, which is read tensor by tensor without building the model; not needed if ``history`` holds them.
        history: Recorded router norms, the path of such a file, or the folder of the checkpoint that training started
            from. The change is measured from its first record up to the model if there is one, else up to its last
            record. Without a history the final norm replaces the change and the plan says ``"baseline": "none"``: its
            ranking then assumes equal norms at the start.
        curvature: For ``statistics``, ``curvature`` and its control: `Curvature` or the path of its file.
        statistics: For the same methods: `ExpertStatistics` or the path of their file. Each width is then fitted as the
            quantize step fits it with them; this takes several times as long. ``statistics`` also prices by them.
        calibration: Batches, mappings of the model's arguments, for a method that knows costs and a model in memory:
            the costs of each layer and projection are scaled to what quantizing them does to the model's predictions on
            about 4,096 tokens (`calibrated_costs`). Experts are ranked as before, layers better.
        method: A key of `METHODS`, except ``sensitivity``; or ``auto``, the best one for what is given: ``statistics``
            or ``curvature`` where there are such and a model, else the paper's rule. The plan says which and why.
        average_bits: Budget in nominal bits per expert weight; 2.5 if no budget is given.
        stored_bits: Budget with scales and offsets included, instead of ``average_bits``.
        expert_gib: Budget as the size of all routed experts in the file, in GiB, instead of ``average_bits``.
        total_gib: Budget as the size of the whole model in the file, in GiB, instead of ``average_bits``.
        rest_gib: What everything but the routed experts takes, for ``total_gib``; None for what the model has.
        bits: Levels to choose from; any number of them, by default 1 to 4, for a method that knows costs, else by
            default 2 and 3. 0 among them lets an expert be dropped, which needs ``statistics``.
        group_size: Weights that share a scale and an offset, along the input dimension.
        granularity: What shares a width: by default ``expert+projection`` for a method that knows costs, else
            ``expert``, the only one for other methods.
        seed: For ``method="random"`` and ``"shuffled_curvature"``.
        zeta: Factor of the paper's reorder rule.
        max_dropped: Largest share of a layer's experts that may be dropped, where 0 is among the levels.
        min_tokens: Tokens of the statistics below which an expert is not dropped.
        router_pattern: As in `find_moe_layers`, where ``model`` needs it; a history brings its own.
        expert_pattern: Names the experts' weights, as in `find_moe_layers`.
        layout: Instead of patterns, the framework whose layout the model has, as in `find_moe_layers`.

    Returns:
        The plan. Its notes hold the assumptions that a reader must know, and each of them is warned about.

    Raises:
        AllocationError: Levels, budget or method are out of range, or a norm is not finite.
        PlanError: The group size does not divide an expert's input width.
        HistoryError: The history is empty or of another model.
        MoELayerError: The model has no Mixture-of-Experts layer.
        CheckpointError: A checkpoint folder is incomplete or damaged.
        StreamingError: A checkpoint cannot be read tensor by tensor; load it and give the model.

    Example:
        >>> plan = allocate(model, method="weight_error", average_bits=2.5, bits=(2, 3), group_size=64)
        >>> plan.average_bits
        2.5
    """
    settings = PlanSettings.among(locals())
    calibrated: Calibration | None = None
    if calibration is not None:
        if not isinstance(model, nn.Module):
            raise AllocationError("calibration runs the model: give it in memory, not its folder")
        if not settings.knows_costs and method != AUTO:
            raise AllocationError(f"method {method!r} has no use for calibration, which scales what widths cost")
        calibrated = calibration_on(model, calibration)
    with without_autocast():
        return make_plan(settings, model, history, curvature, statistics, calibrated)


def make_plan(
    settings: PlanSettings,
    model: Model | None = None,
    history: History | None = None,
    curvature: Curvature | str | os.PathLike[str] | None = None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
) -> PrecisionPlan:
    """`allocate` for settings that were checked already."""
    notes, name = PlanNotes(), settings.method
    if name == AUTO:
        name, notes["auto"] = chosen(model is not None, curvature is not None, statistics is not None)
    _check_sources(settings, name, model, history, curvature, statistics)
    method = METHODS[name]
    with ExitStack() as stack:
        recorded: RouterNormHistory | None = None
        baseline: Snapshot | None = None
        if isinstance(history, Checkpoint) or (isinstance(history, str | os.PathLike) and os.path.isdir(history)):
            initial = stack.enter_context(opened(history))
            notes["initial"] = initial.name
            baseline = StoredWeights(initial, settings.patterns).snapshot(variance=False)
        elif history is not None:
            recorded = history if isinstance(history, RouterNormHistory) else RouterNormHistory.load(history)
            baseline = Snapshot.first_of(recorded)
        weights: Weights | None = None
        if model is not None:
            settings = with_rest(settings, model)
            patterns = settings.patterns or (baseline.patterns if baseline is not None else Patterns())
            if isinstance(model, nn.Module):
                weights = LiveWeights(model, patterns)
            else:
                trained = stack.enter_context(opened(model))
                notes["final"] = trained.name
                weights = StoredWeights(trained, patterns)
            final = weights.snapshot(variance="max_variance" in method.reads)
            if baseline is not None:
                baseline = baseline.in_names_of(final)
            if recorded is not None:
                final = final.at_the_end_of(recorded)
        elif recorded is not None:
            final = Snapshot.last_of(recorded)
        else:
            raise HistoryError("the history holds the baseline alone: give the trained model or its checkpoint too")
        _check_finite(final, recorded)
        settings, costs, tokens = settings.resolved(name, final.layers), None, None
        if method.knows_costs:
            weighed = as_curvature(curvature) if curvature is not None and "curvature" in method.reads else None
            if weighed is not None:
                weighed = weighed.for_layers(final.layers)
                weighed.check_router_norms(final.router_norms)
            under = None if statistics is None else as_statistics(statistics)
            if under is not None:
                under = under.for_layers(final.layers)
                under.check_router_norms(final.router_norms)
                notes["statistics"] = {"text": under.text, "tokens": under.tokens_by_layer()}
                tokens = under.tokens
            settings.check_fits(final.layers)
            assert weights is not None
            together = "statistics" in method.reads
            given = settings.levels, settings.group_size, weighed, under
            costs = weights.costs(*given, together=together, calibration=calibration)
            if under is not None and under.indefinite:
                notes["statistics"]["indefinite"] = len(under.indefinite)
            if calibration is not None:
                notes["calibration_tokens"] = calibration.tokens
    return plan_from_signals(settings, final, baseline, costs, notes, tokens)


def _check_sources(
    settings: PlanSettings,
    name: MethodName,
    model: Model | None,
    history: History | None,
    curvature: Curvature | str | os.PathLike[str] | None,
    statistics: ExpertStatistics | str | os.PathLike[str] | None,
) -> None:
    """Raises `AllocationError` if the method lacks what it reads, or cannot use what is given, before any reading."""
    settings.check_plannable()
    method = METHODS[name]
    if "weights" in method.reads and model is None:
        raise AllocationError(f"method {name!r} measures what each width costs: give the model or its checkpoint")
    if "curvature" in method.reads and curvature is None:
        raise AllocationError(f"method {name!r} needs curvature, which RouterNormMonitor writes beside the plan")
    if "statistics" in method.reads and statistics is None:
        raise AllocationError(
            f"method {name!r} needs expert statistics, which RouterNormMonitor writes beside the plan"
        )
    if statistics is not None and settings.method != AUTO and "curvature" not in method.reads:
        raise AllocationError(
            f"method {name!r} has no use for statistics, which change what a width costs by curvature: "
            "leave them out here, and give them to the quantize step"
        )
    if model is None and history is None:
        raise AllocationError("allocate needs a model, a history, or both")
    if model is None:
        settings.check_rest_known()


def _check_finite(final: Snapshot, history: RouterNormHistory | None) -> None:
    broken = (history.not_finite() if history is not None else None) or final.not_finite()
    if broken:
        raise AllocationError(f"{broken}: the weights are damaged or training has diverged, no plan can be made")
