"""The result of a comparison: one row per method, granularity and budget, and what can be read off them."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..plans.methods import METHODS, MethodName
from ..plans.plan import PrecisionPlan
from ..plans.widths import Granularity
from .divergence import Divergence
from .judge import mean_increase
from .statistics import Interval, resample_documents


@dataclass(frozen=True)
class Row:
    """One plan, or the mean of several draws, by the increase of the loss over the float model (nats per token).

    Attributes:
        method: Name of the allocator.
        granularity: What shares a width.
        asked_bits: The budget, nominal bits; None for ``uniform``, whose rows are shown with every budget.
        average_bits: What the plan reaches, nominal.
        stored_bits: What the plan reaches, scales and offsets included.
        mean: Over all target tokens, with an interval over documents.
        bands: The mean by frequency of the target token; keys of `BANDS`.
        worst_decile: Mean over the tenth of the documents that lose most.
        divergence: How far its predictions are from the float model's.
        task: Task metric, or None.
        draws: Mean increase of each draw of a method that draws, and `rare_draws` on the rare band; else empty.
        plan: The plan (of the first draw).
        sums: Summed increase by document and band, ``(documents, 3)`` float64.
    """

    method: MethodName
    granularity: Granularity
    asked_bits: float | None
    average_bits: float
    stored_bits: float
    mean: Interval
    bands: dict[str, Interval]
    worst_decile: float
    divergence: Divergence
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
        return f"{self.method}, {self.granularity}" if METHODS[self.method].knows_costs else self.method


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
        text: What the tokens are from, in words.
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
    text: str = ""

    @property
    def budgets(self) -> list[float]:
        """Budgets in nominal bits, ascending."""
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
        return next((row for row in self.at(budget) if not METHODS[row.method].control), None)

    def difference(self, row: Row, other: Row, band: str | None = None) -> Interval:
        """Loss of ``row`` minus loss of ``other``, over all tokens or in a band, paired by document."""
        return mean_increase(row.sums - other.sums, self.counts, resample_documents(len(self.counts)), band)

    def to_dict(self) -> dict[str, Any]:
        """Everything but plans, sums by document and the verdict, for JSON."""
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
                "divergence": asdict(row.divergence),
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
            "text": self.text,
            "documents": len(self.counts),
            "tokens": int(self.counts.sum()),
            "loss": _finite(self.loss),
            "task": {"name": self.task_name, "float": self.task},
            "rows": rows,
            "correlations": {signal: _finite(values) for signal, values in self.correlations.items()},
            "skipped": self.skipped,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }


def _interval(interval: Interval) -> dict[str, float | None]:
    return _finite({"value": interval.value, "low": interval.low, "high": interval.high})


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
