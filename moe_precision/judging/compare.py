"""Judges allocation methods on one model: every method at every budget, at equal stored bits, by held-out loss.

KL to the float model stands beside the loss: it is less noisy, and says how far the predictions have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..allocation.costs import Costs
from ..allocation.planning import plan_from_signals
from ..allocation.snapshot import Snapshot
from ..allocation.weights import LiveWeights
from ..layers.patterns import Patterns
from ..plans.levels import check_levels
from ..plans.methods import ALL_METHODS, METHODS, MethodName, reads
from ..plans.notes import PlanNotes
from ..plans.numbers import AllocationError
from ..plans.plan import PrecisionPlan
from ..plans.settings import PlanSettings
from ..plans.widths import GRANULARITIES, Granularity
from ..recording.curvature import Curvature
from ..recording.history import RouterNormHistory
from ..recording.loads import count_loads
from ..recording.statistics import ExpertStatistics
from .comparison import Comparison, Row
from .correlations import correlations
from .divergence import Divergence
from .evaluation import BANDS
from .judge import Judge
from .method_costs import levels_of, method_costs
from .simulation import SimulatedExperts

SHUFFLES = 5  # draws of shuffled_curvature, for each granularity; as many as of random would take most of the time


@dataclass(frozen=True)
class _Known:
    """The trained model as methods see it."""

    final: Snapshot
    baseline: Snapshot | None
    levels: list[int]
    group_size: int
    random_draws: int
    tokens: Mapping[str, Tensor] | None = None  # that the statistics saw each expert with
    calibrated: int = 0  # tokens on which costs were calibrated


@dataclass(frozen=True)
class _Entry:
    """Plans that make one row: one, or all draws of a method that draws."""

    method: MethodName
    granularity: Granularity
    budget: float | None
    plans: list[PrecisionPlan]


def compare(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    token_counts: Tensor,
    history: RouterNormHistory | None = None,
    *,
    curvature: Curvature | None = None,
    statistics: ExpertStatistics | None = None,
    calibration: Sequence[dict[str, Tensor]] = (),
    methods: Sequence[MethodName] = ALL_METHODS,
    budgets: Sequence[float] = (2.5,),
    bits: Sequence[int] = (2, 3),
    group_size: int = 128,
    granularities: Sequence[Granularity] = ("expert", "expert+projection"),
    random_draws: int = 40,
    task: Callable[[PreTrainedModel], float] | None = None,
    task_name: str = "",
    end_of_text: int | None = None,
    text: str = "",
) -> Comparison:
    """Compares allocation methods on one trained model.

    All plans are fitted by ``curvature`` and ``statistics`` if they are given, as the quantize step would. Methods that
    lack what they need are left out, and the result says so.

    Args:
        model: The trained float model, whole on this process; its weights are as before afterwards.
        batches: Held-out batches with labels.
        token_counts: ``(vocab,)``, how often each token occurs in training.
        history: Recorded norms and loads of its training.
        curvature: For ``curvature``, ``statistics`` and the fit.
        statistics: For ``statistics`` and the fit.
        calibration: Batches on which ``sensitivity`` is measured and costs are calibrated, other than those that
            methods are judged on. Without them neither is done. Loads are counted on them if the history has none.
        methods: Names of allocation methods.
        budgets: Nominal bits; at one group size, equal nominal bits are equal stored bits.
        bits: Levels. The paper's rule takes up to three, equally spaced. With 0 among them, methods that can price that
            may drop experts; the others choose from the rest.
        group_size: Weights that share a scale and an offset.
        granularities: For the methods that know costs.
        random_draws: Seeds of ``random``; 39 or more can show a difference at 5 %, two-sided. ``shuffled_curvature``
            takes the first `SHUFFLES` of them.
        task: A metric of the quantized model, such as ROUGE; larger is better. For several draws, the first one's.
        task_name: Its name.
        end_of_text: Token that ends a document, where batches are one packed text in order; None if each row is one.
        text: What the batches are from, in words.

    Raises:
        AllocationError: An unknown method, granularity, or a budget outside the levels.
        PlanError: The group size does not divide an expert's input width.
        HistoryError: The history is of another model.
    """
    levels = sorted(set(bits))
    methods, budgets = list(dict.fromkeys(methods)), list(dict.fromkeys(budgets))
    _check(methods, budgets, granularities, levels, random_draws)
    weights = LiveWeights(model, Patterns() if history is None else history.patterns)
    baseline = None if history is None else Snapshot.first_of(history)
    final = weights.snapshot(variance=True)
    PlanSettings(method="uniform", average_bits=levels[-1], group_size=group_size).check_fits(final.layers)
    if baseline is not None:
        baseline = baseline.in_names_of(final)
    if (baseline is None or not baseline.loads) and calibration:
        final = replace(final, loads=count_loads(model, calibration, **final.patterns))
    if curvature is not None:
        curvature = curvature.for_layers(final.layers)
        curvature.check_router_norms(final.router_norms)
    if statistics is not None:
        statistics = statistics.for_layers(final.layers)
        statistics.check_router_norms(final.router_norms)
    judge = Judge(model, batches, token_counts, end_of_text, weights.layers)
    tokens = None if statistics is None else statistics.tokens
    known = _Known(final, baseline, levels, group_size, random_draws, tokens)
    rows: list[Row] = []
    skipped: list[str] = []
    float_task = None if task is None else task(model)
    with SimulatedExperts(weights.layers, levels, group_size, curvature, statistics=statistics) as simulated:
        costs, calibrated = method_costs(simulated, levels, methods, curvature, model, calibration, skipped)
        known = replace(known, calibrated=calibrated)
        entries = _entries(known, methods, budgets, granularities, costs, skipped)
        with tqdm(total=sum(len(e.plans) for e in entries), desc="comparing", unit="plan", disable=None) as progress:
            for entry in entries:
                for plans in [[plan] for plan in entry.plans] if entry.method == "uniform" else [entry.plans]:
                    found: list[tuple[Tensor, Divergence]] = []
                    tasks: list[float] = []
                    for plan in plans:
                        simulated.apply({name: layer.projection_bits for name, layer in plan.layers.items()})
                        found.append(judge.measure())
                        if task is not None and not tasks:
                            tasks.append(task(model))
                        progress.update()
                    rows.append(_row(entry, plans[0], found, tasks[0] if tasks else None, judge))
    return Comparison(
        model_type=final.model_type,
        levels=levels,
        group_size=group_size,
        loss=judge.loss,
        task_name=task_name,
        task=float_task,
        rows=rows,
        correlations=correlations(final, baseline, costs) if "sensitivity" in costs else {},
        counts=judge.counts,
        skipped=skipped,
        text=text,
    )


def _check(
    methods: Sequence[str],
    budgets: Sequence[float],
    granularities: Sequence[str],
    levels: Sequence[int],
    random_draws: int,
) -> None:
    """Raises `AllocationError` for settings that make a comparison impossible, before any work."""
    for name, given in (("methods", methods), ("budgets", budgets), ("granularities", granularities)):
        if not given:
            raise AllocationError(f"{name} is empty: nothing to compare")
    for method in methods:
        if method not in METHODS:
            raise AllocationError(f"unknown method {method!r}, expected one of {', '.join(ALL_METHODS)}")
    for budget in budgets:
        check_levels(budget, levels)
    for granularity in granularities:
        if granularity not in GRANULARITIES:
            raise AllocationError(f"unknown granularity {granularity!r}, expected one of {', '.join(GRANULARITIES)}")
    if random_draws < 1:
        raise AllocationError(f"random_draws must be at least 1, got {random_draws}")


def _entries(
    known: _Known,
    methods: Sequence[MethodName],
    budgets: Sequence[float],
    granularities: Sequence[Granularity],
    costs: dict[str, Costs],
    skipped: list[str],
) -> list[_Entry]:
    """All plans to judge; what cannot be made is added to ``skipped`` with the reason."""
    entries = []
    for method in (one for one in methods if not METHODS[one].knows_costs or one in costs):
        for asked in [None] if method == "uniform" else [*budgets]:
            for granularity in _granularities(method, granularities):
                try:
                    plans = _plans(known, method, granularity, asked, costs.get(method))
                except AllocationError as error:
                    skipped.append(f"{method} at {asked:g} bits: {error}")
                else:
                    entries.append(_Entry(method, granularity, asked, plans))
    return entries


def _granularities(method: MethodName, asked: Sequence[Granularity]) -> Sequence[Granularity]:
    """Those that make a difference to a method: shuffled experts of a layer cost together what they did."""
    if method == "shuffled_curvature":
        return [granularity for granularity in asked if granularity.startswith("expert")]
    return asked if METHODS[method].knows_costs else GRANULARITIES[:1]


def _plans(
    known: _Known, method: MethodName, granularity: Granularity, budget: float | None, costs: Costs | None
) -> list[PrecisionPlan]:
    """The plan of a method, all draws of one that draws, or ``uniform`` at every level."""

    def plan(average_bits: float, seed: int = 0) -> PrecisionPlan:
        settings = PlanSettings(
            method=method,
            average_bits=average_bits,
            bits=levels_of(method, known.levels),
            group_size=known.group_size,
            granularity=granularity,
            seed=seed,
        )
        scaled = known.calibrated and METHODS[method].knows_costs and not reads(method, "calibration")
        notes = PlanNotes(calibration_tokens=known.calibrated) if scaled else None
        return plan_from_signals(settings, known.final, known.baseline, costs, notes, known.tokens)

    if budget is None:
        return [plan(level) for level in levels_of(method, known.levels)]
    draws = {"random": known.random_draws, "shuffled_curvature": min(SHUFFLES, known.random_draws)}.get(method, 1)
    return [plan(budget, seed) for seed in range(draws)]


def _row(
    entry: _Entry, plan: PrecisionPlan, found: list[tuple[Tensor, Divergence]], task: float | None, judge: Judge
) -> Row:
    sums = [one for one, _ in found]
    mean = torch.stack(sums).mean(0)
    tokens, rare = judge.counts.sum(), judge.counts[:, BANDS.index("rare")].sum()
    draws = sums if METHODS[entry.method].seeded else []
    return Row(
        entry.method,
        entry.granularity,
        entry.budget,
        plan.average_bits,
        plan.stored_bits,
        mean=judge.mean(mean),
        bands={band: judge.mean(mean, band) for band in BANDS},
        worst_decile=judge.worst_decile(mean),
        divergence=Divergence.mean_of([one for _, one in found]),
        task=task,
        plan=plan,
        sums=mean,
        draws=[float(one.sum() / tokens) for one in draws],
        rare_draws=[float(one[:, BANDS.index("rare")].sum() / rare) for one in draws],
    )
