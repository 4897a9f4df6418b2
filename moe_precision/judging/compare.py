"""Judges allocation methods on one model: every method at every budget, at equal stored bits, by held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from ..plans.methods import ALL_METHODS, METHODS, MethodName
from ..plans.plan import PrecisionPlan
from ..plans.settings import AllocationError, PlanSettings, check_levels
from ..plans.widths import GRANULARITIES, Granularity
from ..recording.curvature import Curvature
from ..recording.history import RouterNormHistory
from ..recording.loads import count_loads
from .comparison import Comparison, Row
from .evaluation import BANDS, document_losses
from .judge import Judge
from .simulation import SimulatedExperts
from .statistics import rank_correlation


@dataclass(frozen=True)
class _Known:
    """The trained model as methods see it."""

    final: Snapshot
    baseline: Snapshot | None
    levels: list[int]
    group_size: int
    random_draws: int


@dataclass(frozen=True)
class _Entry:
    """Plans that make one row: one, or all random draws."""

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
) -> Comparison:
    """Compares allocation methods on one trained model.

    All plans are fitted by ``curvature`` if it is given, as the quantize step would. Methods that lack what they need
    are left out, and the result says so.

    Args:
        model: The trained float model, whole on this process; its weights are as before afterwards.
        batches: Held-out batches with labels.
        token_counts: ``(vocab,)``, how often each token occurs in training.
        history: Recorded norms and loads of its training.
        curvature: For ``curvature`` and the fit.
        calibration: Batches on which ``sensitivity`` is measured, other than those that methods are judged on. Without
            them it is left out. Loads are counted on them if the history has none.
        methods: Names of allocation methods.
        budgets: Nominal bits; at one group size, equal nominal bits are equal stored bits.
        bits: Levels. The paper's rule takes up to three, equally spaced.
        group_size: Weights that share a scale and an offset.
        granularities: For the methods that know costs.
        random_draws: Seeds of ``random``; 39 or more can show a difference at 5 %, two-sided.
        task: A metric of the quantized model, such as ROUGE; larger is better. For random order, the first draw's.
        task_name: Its name.
        end_of_text: Token that ends a document, where batches are one packed text in order; None if each row is one.

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
    PlanSettings(method="uniform", average_bits=levels[0], group_size=group_size).check_fits(final.layers)
    if baseline is not None:
        baseline.check_same_model(final)
    if (baseline is None or not baseline.loads) and calibration:
        final = replace(final, loads=count_loads(model, calibration, **final.patterns))
    if curvature is not None:
        curvature.check_layers(final.layers)
        curvature.check_router_norms(final.router_norms)
    judge = Judge(model, batches, token_counts, end_of_text)
    known = _Known(final, baseline, levels, group_size, random_draws)
    rows: list[Row] = []
    skipped: list[str] = []
    float_task = None if task is None else task(model)
    with SimulatedExperts(weights.layers, levels, group_size, curvature) as simulated:
        costs = _all_costs(simulated, levels, methods, curvature, model, calibration, skipped)
        entries = _entries(known, methods, budgets, granularities, costs, skipped)
        with tqdm(total=sum(len(e.plans) for e in entries), desc="comparing", unit="plan", disable=None) as progress:
            for entry in entries:
                for plans in [[plan] for plan in entry.plans] if entry.method == "uniform" else [entry.plans]:
                    sums: list[Tensor] = []
                    tasks: list[float] = []
                    for plan in plans:
                        simulated.apply({name: layer.projection_bits for name, layer in plan.layers.items()})
                        sums.append(judge.increase())
                        if task is not None and not tasks:
                            tasks.append(task(model))
                        progress.update()
                    rows.append(_row(entry, plans[0], sums, tasks[0] if tasks else None, judge))
    return Comparison(
        model_type=final.model_type,
        levels=levels,
        group_size=group_size,
        loss=judge.loss,
        task_name=task_name,
        task=float_task,
        rows=rows,
        correlations=_correlations(known, costs) if "sensitivity" in costs else {},
        counts=judge.counts,
        skipped=skipped,
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
            for granularity in granularities if METHODS[method].knows_costs else (GRANULARITIES[0],):
                try:
                    plans = _plans(known, method, granularity, asked, costs.get(method))
                except AllocationError as error:
                    skipped.append(f"{method} at {asked:g} bits: {error}")
                else:
                    entries.append(_Entry(method, granularity, asked, plans))
    return entries


def _plans(
    known: _Known, method: MethodName, granularity: Granularity, budget: float | None, costs: Costs | None
) -> list[PrecisionPlan]:
    """The plan of a method, all draws of ``random``, or ``uniform`` at every level."""

    def plan(average_bits: float, seed: int = 0) -> PrecisionPlan:
        settings = PlanSettings(
            method=method,
            average_bits=average_bits,
            bits=known.levels,
            group_size=known.group_size,
            granularity=granularity,
            seed=seed,
        )
        return plan_from_signals(settings, known.final, known.baseline, costs)

    if budget is None:
        return [plan(level) for level in known.levels]
    return [plan(budget, seed) for seed in range(known.random_draws if method == "random" else 1)]


def _row(entry: _Entry, plan: PrecisionPlan, sums: list[Tensor], task: float | None, judge: Judge) -> Row:
    mean = torch.stack(sums).mean(0)
    tokens, rare = judge.counts.sum(), judge.counts[:, BANDS.index("rare")].sum()
    random = entry.method == "random"
    return Row(
        entry.method,
        entry.granularity,
        entry.budget,
        plan.average_bits,
        plan.stored_bits,
        mean=judge.mean(mean),
        bands={band: judge.mean(mean, band) for band in BANDS},
        worst_decile=judge.worst_decile(mean),
        task=task,
        plan=plan,
        sums=mean,
        draws=[float(one.sum() / tokens) for one in sums] if random else [],
        rare_draws=[float(one[:, BANDS.index("rare")].sum() / rare) for one in sums] if random else [],
    )


def _all_costs(
    simulated: SimulatedExperts,
    levels: Sequence[int],
    methods: Sequence[str],
    curvature: Curvature | None,
    model: PreTrainedModel,
    calibration: Sequence[dict[str, Tensor]],
    skipped: list[str],
) -> dict[str, Costs]:
    """What each width costs according to every method that knows costs."""
    found: dict[str, Costs] = {}
    if "weight_error" in methods:
        found["weight_error"] = simulated.costs(levels, None)
    if "curvature" in methods and curvature is None:
        skipped.append("curvature: no curvature is given")
    elif "curvature" in methods:
        found["curvature"] = simulated.costs(levels, curvature)
    if "sensitivity" in methods and not calibration:
        skipped.append("sensitivity: no calibration batches are given")
    elif "sensitivity" in methods:
        found["sensitivity"] = simulated.sensitivity(
            levels, lambda: float(document_losses(model, calibration)[0].double().mean())
        )
    return found


def _correlations(known: _Known, costs: dict[str, Costs]) -> dict[str, dict[str, float]]:
    """Correlation of every signal with the measured sensitivity at the lowest level, by layer and over all experts."""
    final, baseline = known.final, known.baseline

    def at_lowest(method: str) -> dict[str, Tensor]:
        return {name: sum(of[:, 0] for of in found.values()) for name, found in costs[method].items()}  # type: ignore[misc]

    signals: dict[str, dict[str, Tensor]] = {}
    if baseline is not None:
        first = baseline.router_norms
        signals["router_norm_change"] = {name: first[name] - norm for name, norm in final.router_norms.items()}
    signals["final_router_norm"] = {name: -norm for name, norm in final.router_norms.items()}
    signals["max_variance"] = dict(final.max_variance)
    loads = final.loads if baseline is None else baseline.loads or final.loads
    if len(loads) == len(final.layers):
        signals["expert_load"] = {name: load[0] for name, load in loads.items()}
        if not any(load[1].isnan().any() for load in loads.values()):
            signals["routing_weight"] = {name: load[1] for name, load in loads.items()}
    signals |= {method: at_lowest(method) for method in ("weight_error", "curvature") if method in costs}
    reference = at_lowest("sensitivity")
    found = {}
    for signal, by_layer in signals.items():
        together = [torch.cat([of[name].double() for name in reference]) for of in (by_layer, reference)]
        found[signal] = {"all": rank_correlation(*together)}
        found[signal] |= {name: rank_correlation(by_layer[name], reference[name]) for name in reference}
    return found
