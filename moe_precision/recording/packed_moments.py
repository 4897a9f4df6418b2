"""Second moments as they are kept: a diagonal in float32 and, of one triangle, correlations in float16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MoEPrecisionError

SHRINK = 0.3  # tokens for each input column at which half of a second moment is kept


class StatisticsError(MoEPrecisionError, ValueError):
    """Experts whose inputs cannot be seen, a damaged file, or statistics of another model."""


def packed(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonals ``(E, in)`` float32 and correlations ``(E, in * (in - 1) / 2)`` float16 of ``(E, in, in)``."""
    diagonals, above = [], []
    mask = _above_diagonal(moments.shape[-1])
    for moment in moments:  # one at a time, on the CPU
        moment = moment.float().cpu()
        diagonal = moment.diagonal().clone()
        scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        diagonals.append(diagonal)
        above.append((moment * scale).mul_(scale.unsqueeze(1)).masked_select(mask).half())
    return torch.stack(diagonals), torch.stack(above)


def whole(diagonal: Tensor, correlations: Tensor) -> Tensor:
    """The second moment ``(in, in)`` float32 of its diagonal ``(in,)`` and the triangle above it, row after row."""
    above = torch.zeros(len(diagonal), len(diagonal), dtype=torch.float32)
    above.masked_scatter_(_above_diagonal(len(diagonal)), correlations.float())
    root = diagonal.sqrt()
    above.mul_(root).mul_(root.unsqueeze(1))
    return (above + above.T).diagonal_scatter(diagonal)


def shrunk(diagonal: Tensor, correlations: Tensor, tokens: int, column_weights: Tensor | None = None) -> Tensor | None:
    """The second moment to round under: the fewer tokens, the closer to its diagonal.

    `ExpertStatistics.fit_moment` states the rule.

    Args:
        diagonal: ``(in,)`` float32.
        correlations: ``(in * (in - 1) / 2)`` float16.
        tokens: What they rest on.
        column_weights: ``(in,)``; None, or 0 in all columns, for all alike.

    Returns:
        ``(in, in)`` float32; None where there are no tokens, or the inputs were all 0.
    """
    if tokens == 0 or not diagonal.any():
        return None
    share = SHRINK * len(diagonal) / (tokens + SHRINK * len(diagonal))
    weights = torch.ones_like(diagonal) if column_weights is None else column_weights.to(diagonal)
    if not weights.any():  # an expert that never had a gradient
        weights = torch.ones_like(diagonal)
    moment = whole(diagonal, correlations).mul_(1 - share)
    moment.diagonal().add_(weights / weights.mean() * (share * diagonal.mean()))
    return moment


def check_moment(diagonal: Tensor, above: Tensor, where: str) -> None:
    """Raises `StatisticsError`, which begins with ``where``, for values that no second moment has."""
    if not (diagonal.is_floating_point() and above.is_floating_point()):
        raise StatisticsError(f"{where}: expected floats, got {diagonal.dtype} and {above.dtype}")
    if not (diagonal.isfinite().all() and above.isfinite().all()):
        raise StatisticsError(f"{where}: holds values that are not finite; has training diverged?")
    if (diagonal < 0).any():
        raise StatisticsError(f"{where}: mean squares of inputs go down to {float(diagonal.min()):.3g}, expected 0")
    if above.numel() and float(above.abs().max()) > 1.01:
        raise StatisticsError(f"{where}: correlations of inputs go up to {float(above.abs().max()):.3g}, expected 1")


def _above_diagonal(width: int) -> Tensor:
    """A mask ``(width, width)``."""
    return torch.ones(width, width, dtype=torch.bool).triu_(1)
