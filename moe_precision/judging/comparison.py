"""Judges allocation methods on one model: every method at every budget, at equal stored bits, by held-out loss."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..allocation.allocator import (
    ALL_METHODS,
    COST_METHODS,
    METHODS,
    AllocationError,
    check_granularity,
    plan_of_signals,
)
from ..allocation.costs import Costs
from ..allocation.orders import check_budget, check_levels
from ..layers.moe_layers import find_moe_layers
from ..plans.plan import PrecisionPlan, check_group_size, model_type_of
from ..recording.curvature import Curvature
from ..recording.history import HistoryError, RouterNormHistory
from ..recording.loads import count_loads
from ..recording.router_norms import router_norms
from .evaluation import BANDS, document_losses, frequency_bands
from .simulation import SimulatedExperts
from .statistics import Interval, bootstrap, p_among_draws, rank_correlation, resample_documents

CONTROLS = ("uniform", "random", "reversed", "least_load")
WORST_SHARE = 0.1  # of the documents
FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class Row:
    """One plan, or the mean of all random draws, by the increase of the loss over the float model (nats a token).

    Attributes:
        method: Name of the allocator.
        granularity: What shares a width.
        asked_bits: The budget, nominal bits; None for ``uniform``, whose rows stand beside every budget.
        average_bits: What the plan reaches, nominal.
        stored_bits: The same with scales and offsets.
        mean: Over all target tokens, with an interval over documents.
        bands: The same by frequency of the target token; keys of `BANDS`.
        worst_decile: Mean over the tenth of the documents that lose most.
        task: Task metric, or None.
        draws: Mean increase of each random draw, and `rare_draws` on the rare band; empty for other methods.
        plan: The plan (of the first draw).
        sums: Summed increase by document and band, ``(documents, 3)`` float64.
    """

    method: str
    granularity: str
    asked_bits: float | None
    average_bits: float
    stored_bits: float
    mean: Interval
    bands: dict[str, Interval]
    worst_decile: float
    task: float | None
    plan: PrecisionPlan = field(repr=False)
    sums: Tensor = field(repr=False)
    draws: list[float] = field(default_factory=list, repr=False)
    rare_draws: list[float] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """Method, with its granularity where it has a choice."""
        if self.method == "uniform":
            return f"uniform {self.average_bits:g} bits"
        return f"{self.method}, {self.granularity}" if self.method in COST_METHODS else self.method


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        model_type: transformers' ``config.model_type``.
        levels: Widths that plans chose from.
        group_size: Weights that share a scale and an offset.
        loss: Of the float model, over all tokens and by band.
        task_name: Name of the task metric, or empty.
        task: Task metric of the float model, or None.
        rows: One for each method, granularity and budget.
        correlations: Signal -> ``all`` or a layer -> Spearman's correlation with the measured sensitivity, positive
            where the signal gives more bits to experts that need them; empty if the sensitivity was not measured.
        counts: Tokens by document and band, ``(documents, 3)``.
        skipped: What could not be compared, and why.
    """

    model_type: str
    levels: list[int]
    group_size: int
    loss: dict[str, float]
    task_name: str
    task: float | None
    rows: list[Row]
    correlations: dict[str, dict[str, float]]
    counts: Tensor = field(repr=False)
    skipped: list[str] = field(default_factory=list)

    @property
    def budgets(self) -> list[float]:
        """Budgets in nominal bits, rising."""
        return sorted({row.asked_bits for row in self.rows if row.asked_bits is not None})

    def at(self, budget: float) -> list[Row]:
        """Rows of one budget, least mean loss first."""
        return sorted((row for row in self.rows if row.asked_bits == budget), key=lambda row: row.mean.value)

    def get(self, method: str, budget: float | None, granularity: str = "expert") -> Row | None:
        """The row of a method, if it was compared."""
        key = (method, budget, granularity)
        return next((row for row in self.rows if (row.method, row.asked_bits, row.granularity) == key), None)

    def winner(self, budget: float) -> Row | None:
        """The method with the least mean loss, controls left out; None if only controls were compared."""
        return next((row for row in self.at(budget) if row.method not in CONTROLS), None)

    def difference(self, row: Row, other: Row, band: str | None = None) -> Interval:
        """Loss of ``row`` minus loss of ``other``, over all tokens or in a band, paired by document."""
        return _mean(row.sums - other.sums, self.counts, resample_documents(len(self.counts)), band)

    def to_dict(self) -> dict[str, Any]:
        """Everything but plans and sums by document, for JSON."""
        rows = [
            {
                "method": row.method,
                "granularity": row.granularity,
                "asked_bits": row.asked_bits,
                "average_bits": round(row.average_bits, 6),
                "stored_bits": round(row.stored_bits, 6),
                "increase": _interval(row.mean),
                "increase_by_band": {band: _interval(value) for band, value in row.bands.items()},
                "increase_worst_decile_of_documents": row.worst_decile,
                "task": row.task,
                "draws": row.draws,
                "rare_draws": row.rare_draws,
            }
            for row in self.rows
        ]
        return {
            "format": "moe-precision-comparison",
            "format_version": 1,
            "model_type": self.model_type,
            "levels": self.levels,
            "group_size": self.group_size,
            "documents": len(self.counts),
            "tokens": int(self.counts.sum()),
            "loss": _finite(self.loss),
            "task": {"name": self.task_name, "float": self.task},
            "rows": rows,
            "correlations": {signal: _finite(values) for signal, values in self.correlations.items()},
            "skipped": self.skipped,
            "verdict": verdict(self),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }


class Judge:
    """Held-out text, and the losses of the float model on it: what all quantized models are compared with.

    Args:
        model: The float model; later calls look at whatever it is then.
        batches: Held-out batches with labels.
        token_counts: ``(vocab,)``, how often each token occurs in training.
        end_of_text: Token that ends a document, where batches are one packed text in order; None if every row is one.

    Attributes:
        counts: Tokens by document and band, ``(documents, 3)`` float64.
        loss: Of the float model, over all tokens and by band.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[dict[str, Tensor]],
        token_counts: Tensor,
        end_of_text: int | None = None,
    ) -> None:
        self._model, self._batches = model, list(batches)
        self._losses, targets, documents = document_losses(model, self._batches)
        if len(targets) == 0:
            raise ValueError("no target tokens: every label is -100")
        if int(targets.max()) >= len(token_counts):
            raise ValueError(f"token_counts has {len(token_counts)} entries, a target is token {int(targets.max())}")
        if end_of_text is not None:
            ends = targets == end_of_text
            documents = ends.cumsum(0) - ends.long()  # the end belongs to its text
        bands = frequency_bands(targets, token_counts)
        self._cells = documents * len(BANDS) + bands
        self._shape = (int(documents.max()) + 1, len(BANDS))
        self.counts = self._by_cell(torch.ones_like(self._losses))
        self._resamples = resample_documents(len(self.counts))
        self.loss = {"all": float(self._losses.double().mean())}
        self.loss |= {band: float(self._losses[bands == i].double().mean()) for i, band in enumerate(BANDS)}

    def _by_cell(self, values: Tensor) -> Tensor:
        sums = torch.zeros(self._shape[0] * self._shape[1], dtype=torch.float64)
        return sums.index_add_(0, self._cells, values.double()).view(self._shape)

    def increase(self) -> Tensor:
        """Loss of the model as it is now minus that of the float model, summed by document and band."""
        return self._by_cell(document_losses(self._model, self._batches)[0] - self._losses)

    def mean(self, sums: Tensor, band: str | None = None) -> Interval:
        """Mean increase a token, over all tokens or in a band, with its interval over documents."""
        return _mean(sums, self.counts, self._resamples, band)

    def worst_decile(self, sums: Tensor) -> float:
        """Mean increase over the tenth of the documents that lose most."""
        tokens = self.counts.sum(1)
        by_document = (sums.sum(1) / tokens)[tokens > 0].sort(descending=True).values
        return float(by_document[: max(1, round(WORST_SHARE * len(by_document)))].mean())


def _mean(sums: Tensor, counts: Tensor, resamples: Tensor, band: str | None) -> Interval:
    columns = slice(None) if band is None else slice(BANDS.index(band), BANDS.index(band) + 1)
    return bootstrap(sums[:, columns].sum(1), counts[:, columns].sum(1), resamples)


@dataclass(frozen=True)
class _Entry:
    """Plans that make one row: one, or all random draws."""

    method: str
    granularity: str
    budget: float | None
    plans: list[PrecisionPlan]


def compare(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    token_counts: Tensor,
    history: RouterNormHistory | None = None,
    curvature: Curvature | None = None,
    calibration: Sequence[dict[str, Tensor]] = (),
    methods: Sequence[str] = ALL_METHODS,
    budgets: Sequence[float] = (2.5,),
    bits: Sequence[int] = (2, 3),
    group_size: int = 128,
    granularities: Sequence[str] = ("expert", "expert+projection"),
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
        calibration: Batches on which ``sensitivity`` is measured, not those it is judged on. Without them it is left
            out. Loads are counted on them if the history has none.
        methods: Names of allocators.
        budgets: Nominal bits; at one group size, equal nominal bits are equal stored bits.
        bits: Levels. The paper's rule takes up to three, equally spaced.
        group_size: Weights that share a scale and an offset.
        granularities: For the methods that know costs.
        random_draws: Seeds of ``random``; 39 or more can show a difference at 5 %, both ways.
        task: A metric of the quantized model, such as ROUGE; larger is better. Of random order the first draw's.
        task_name: What it is called.
        end_of_text: Token that ends a document, where batches are one packed text in order; None if every row is one.

    Raises:
        AllocationError: An unknown method, granularity, or a budget outside of the levels.
        PlanError: The group size does not divide.
    """
    layers = find_moe_layers(model, **({} if history is None else history.patterns))
    levels = sorted(set(bits))
    methods, budgets = list(dict.fromkeys(methods)), list(dict.fromkeys(budgets))
    for name, given in (("methods", methods), ("budgets", budgets), ("granularities", granularities)):
        if not given:
            raise AllocationError(f"{name} is empty: nothing to compare")
    for method in methods:
        if method not in ALL_METHODS:
            raise AllocationError(f"unknown method {method!r}, expected one of {', '.join(ALL_METHODS)}")
    for budget in budgets:
        check_levels(budget, levels)
    for granularity in granularities:
        check_granularity("curvature", granularity)
    for layer in layers:
        check_group_size(group_size, layer.name, layer.projections)
    if random_draws < 1:
        raise AllocationError(f"random_draws must be at least 1, got {random_draws}")
    final = final_history(model, history, layers, calibration)
    if curvature is not None:
        curvature.check_layers(final.layers)
        curvature.check_router_norms(final.last)
    judge = Judge(model, batches, token_counts, end_of_text)
    rows: list[Row] = []
    skipped: list[str] = []
    float_task = None if task is None else task(model)
    with SimulatedExperts(layers, levels, group_size, curvature) as simulated:
        costs = _all_costs(simulated, levels, methods, curvature, model, calibration, skipped)
        entries = []
        for method in (method for method in methods if method in METHODS or method in costs):
            known = (final, history is not None, costs.get(method), levels, group_size, random_draws)
            for asked in [None] if method == "uniform" else [*budgets]:
                for granularity in granularities if method in COST_METHODS else ("expert",):
                    try:
                        plans = _plans(method, granularity, asked, *known)
                    except AllocationError as error:
                        skipped.append(f"{method} at {asked:g} bits: {error}")
                    else:
                        entries.append(_Entry(method, granularity, asked, plans))
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
    correlations = _correlations(final, costs) if "sensitivity" in costs else {}
    return Comparison(
        final.model_type,
        levels,
        group_size,
        judge.loss,
        task_name,
        float_task,
        rows,
        correlations,
        judge.counts,
        skipped,
    )


def _plans(
    method: str,
    granularity: str,
    budget: float | None,
    final: RouterNormHistory,
    has_baseline: bool,
    costs: Costs | None,
    levels: Sequence[int],
    group_size: int,
    random_draws: int,
) -> list[PrecisionPlan]:
    """The plan of a method, all draws of ``random``, or ``uniform`` at every level."""
    baseline = final if has_baseline else None
    if budget is None:
        return [plan_of_signals(final, baseline, method, level, [level], group_size) for level in levels]
    if method in METHODS:
        check_budget(budget, levels)
    seeds = range(random_draws if method == "random" else 1)
    return [
        plan_of_signals(final, baseline, method, budget, levels, group_size, seed, granularity, costs=costs)
        for seed in seeds
    ]


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


def final_history(
    model: PreTrainedModel, history: RouterNormHistory | None, layers: Any, calibration: Sequence[dict[str, Tensor]]
) -> RouterNormHistory:
    """First norms and loads of the history with the last norms and variances of the model itself."""
    final = RouterNormHistory.of(layers, model_type_of(model), {} if history is None else history.patterns)
    if history is not None:
        if list(history.layers.items()) != list(final.layers.items()):
            raise HistoryError(f"the history is of another model: it has layers {list(history.layers)}")
        final.record(history.steps[0], torch.cat(list(history.first.values())))
        final.loads = history.loads
    final.record(history.steps[-1] if history is not None else 0, router_norms(layers))
    final.measure_variance(layers)
    if not final.loads.get("training") and calibration:
        final.loads = {"validation": count_loads(model, calibration, **final.patterns)}
    return final


def _all_costs(
    simulated: SimulatedExperts,
    levels: Sequence[int],
    methods: Sequence[str],
    curvature: Curvature | None,
    model: PreTrainedModel,
    calibration: Sequence[dict[str, Tensor]],
    skipped: list[str],
) -> dict[str, Costs]:
    """What each width costs by every method that knows."""
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


def _correlations(final: RouterNormHistory, costs: dict[str, Costs]) -> dict[str, dict[str, float]]:
    """Of every signal with the measured sensitivity at the lowest level, by layer and over all experts."""

    def at_lowest(method: str) -> dict[str, Tensor]:
        return {name: sum(of[:, 0] for of in found.values()) for name, found in costs[method].items()}  # type: ignore[misc]

    signals: dict[str, dict[str, Tensor]] = {}
    if len(final.steps) > 1:
        signals["router_norm_change"] = {name: -change for name, change in final.changes().items()}
    signals["final_router_norm"] = {name: -norm for name, norm in final.last.items()}
    signals["max_variance"] = dict(final.max_variance)
    loads = final.loads.get("training") or final.loads.get("validation") or {}
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


def verdict(comparison: Comparison) -> list[str]:
    """What the figures say in plain words, a line a budget and one on the ranking of experts."""
    lines = []
    for budget in comparison.budgets:
        parts = []
        paper, random = comparison.get("router_norm", budget), comparison.get("random", budget)
        if paper is not None and random is not None:
            rare = paper.bands["rare"].value
            on_mean, on_rare = (
                _against(value, draws) for value, draws in ((paper.mean.value, random.draws), (rare, random.rare_draws))
            )
            parts.append(
                f"the router-norm order {on_rare} on rare tokens and {on_mean} on the mean ({len(random.draws)} draws)"
            )
        best = comparison.winner(budget)
        if best is None:
            lines.append(f"At {budget:g} bits only controls were compared.")
            continue
        text = f"use `{best.name}` ({best.stored_bits:.3g} stored bits), which loses least here: {best.mean} nats"
        if paper is not None and best is not paper:
            gain, rare_gain = comparison.difference(best, paper), comparison.difference(best, paper, "rare")
            few = f", though {len(comparison.counts)} documents are few" * (len(comparison.counts) < FEW_DOCUMENTS)
            sure = few if gain.high < 0 else ", which is within the noise"
            text += f", {gain} against the router-norm order{sure}; on rare tokens {rare_gain}"
        parts.append(text)
        lines.append(f"At {budget:g} bits on this model " + "; ".join(parts) + ".")
    if comparison.correlations:
        known = {signal: of["all"] for signal, of in comparison.correlations.items() if math.isfinite(of["all"])}
        listed = ", ".join(
            f"{signal} {known[signal]:.2f}" for signal in sorted(known, key=known.__getitem__, reverse=True)
        )
        lines.append(f"Rank correlation with the measured sensitivity over all experts: {listed}.")
    if len(comparison.counts) < FEW_DOCUMENTS:
        lines.append(f"Documents: {len(comparison.counts)}. Intervals are rough, judge on {FEW_DOCUMENTS} or more.")
    return lines


def _against(value: float, draws: list[float]) -> str:
    p = p_among_draws(value, draws)
    if p <= 0.05:
        return f"{'beats' if value < sum(draws) / len(draws) else 'loses to'} random order (p={p:.2g})"
    if p_among_draws(min(draws) - 1, draws) > 0.05:
        return f"cannot be told from random order with {len(draws)} draws"
    return f"does not differ from random order (p={p:.2g})"


def _interval(interval: Interval) -> dict[str, float | None]:
    return _finite({"value": interval.value, "low": interval.low, "high": interval.high})


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
