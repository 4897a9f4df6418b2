"""Intervals and rank correlations for comparisons: pure functions on tensors, seeded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; NaN limits where there is nothing to estimate one from."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4f}"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def resample_documents(documents: int, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """How often each document is drawn in each bootstrap resample, ``(resamples, documents)`` float64.

    The same resamples serve all models of a comparison, so that their differences are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(documents, (resamples, documents), generator=generator)
    counts = torch.zeros(resamples, documents, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def bootstrap(sums: Tensor, counts: Tensor, draws: Tensor) -> Interval:
    """Mean over tokens and its percentile interval over documents.

    Args:
        sums: ``(documents,)`` float64, summed over the tokens of each.
        counts: ``(documents,)``, number of tokens of each.
        draws: As `resample_documents` returns it.
    """
    value = float(sums.sum() / counts.sum())
    if (counts > 0).sum() < 2:
        return Interval(value, math.nan, math.nan)
    totals = draws @ counts.double()
    means = ((draws @ sums.double()) / totals)[totals > 0]  # a resample may have no token of a band
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def mean_of_runs(values: Sequence[float]) -> Interval:
    """Mean of independent runs and its interval by Student's t; of zero width for a single run."""
    tensor = torch.tensor(values, dtype=torch.float64)
    mean = float(tensor.mean())
    if len(values) < 2:
        return Interval(mean, mean, mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * tensor.std() / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def ratio_of_runs(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Ratio of the means of paired runs, with its interval by Fieller's theorem.

    The interval is ``(-inf, inf)`` where the denominator's mean does not differ from 0.
    """
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (numerators, denominators))
    ratio = float(a.mean() / b.mean())
    if len(a) < 2:
        return Interval(ratio, ratio, ratio)
    count = len(a)
    t2 = float(stats.t.ppf(0.975, count - 1)) ** 2
    saa, sbb = float(a.var()) / count, float(b.var()) / count
    sab = float(((a - a.mean()) * (b - b.mean())).sum()) / (count - 1) / count
    x, y = float(a.mean()), float(b.mean())
    square = y * y - t2 * sbb
    if square <= 0:
        return Interval(ratio, float("-inf"), float("inf"))
    middle = x * y - t2 * sab
    half = max(middle * middle - square * (x * x - t2 * saa), 0.0) ** 0.5
    return Interval(ratio, (middle - half) / square, (middle + half) / square)


def rank_correlation(signal: Tensor, reference: Tensor) -> float:
    """Spearman's rank correlation; NaN where one of the two is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(signal.double().numpy(), reference.double().numpy()).statistic)


def p_among_draws(value: float, draws: Sequence[float]) -> float:
    """Two-sided p-value of a loss among random draws: twice ``(1 + k) / (1 + n)``, k of n draws at least as extreme."""
    below, above = sum(draw <= value for draw in draws), sum(draw >= value for draw in draws)
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(draws)))
