"""Fits codes, scales and offsets to a weight matrix: least squares with an unbiased gain, one group at a time.

A plain least-squares fit has the lowest weight error, but each group of it is a conditional mean: every output of the
layer shrinks by the same relative error, and so on through the depth of the model. Making the gain unbiased costs a
little weight error and repairs the loss, above all at 1 and 2 bits.

Where the curvature of the loss is known, it weights each input column in the fit. Where the second moment of the inputs
is known, this fit is where `rounding` starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import MoEPrecisionError
from .rounding import round_by_moment
from .scales import lost_in_float16, stored_scales

Quantized = tuple[Tensor, Tensor, Tensor]  # codes (..., out, in) uint8, scales and offsets (..., in / group) float16
Fit = Callable[[Tensor, int, int], Quantized]  # of matrices (N, out, in), a width and a group size
Fits = Callable[[Sequence[int]], Fit]  # of some of a bank's matrices, by their index

_ITERATIONS = 20
_BETWEEN = 0.45  # of a step, from the nearest code
CHUNK = 1 << 18  # weights fitted at a time: bounds the memory and stays in cache


class FitError(MoEPrecisionError, ValueError):
    """A matrix that codes and stored scales cannot hold.

    Args:
        message: What is wrong with it.
        index: Which of several it is.
    """

    def __init__(self, message: str, index: int = 0) -> None:
        self.index = index
        super().__init__(message)


def at_a_time(indices: Sequence[int], shape: tuple[int, int]) -> Iterator[Sequence[int]]:
    """Cuts a list of matrices of one shape into parts that are fitted together: small ones are many at a time."""
    step = max(1, CHUNK // (shape[0] * shape[1]))
    return (indices[start : start + step] for start in range(0, len(indices), step))


def least_squares_codes(groups: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Alternates between rounding to codes and regressing the weights on them, starting from each group's range.

    More starts, which clip the range, lower the weight error by a few percent and do not lower the loss.

    Args:
        groups: ``(N, group)`` float32, one group per row.
        bits: Width of a code.
        weights: How much each error counts, in the groups' shape, with a mean of 1 per group; None for equal weights.

    Returns:
        ``(N, group)`` float32 of whole numbers from 0 to ``2**bits - 1``.
    """
    top = 2**bits - 1
    low, high = groups.aminmax(dim=1, keepdim=True)  # (N, 1)
    codes = _round(groups, (high - low) / top, low, top)
    for _ in range(_ITERATIONS):
        before, codes = codes, _round(groups, *least_squares_scale(groups, codes, weights), top)
        if torch.equal(codes, before):  # and so it would stay
            break
    return codes


def least_squares_scale(groups: Tensor, codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and offset, each ``(N, 1)``, with the least squared error for given codes; scale 0 for constant groups."""
    by_w, by_q = (groups, codes) if weights is None else (groups * weights, codes * weights)
    mean_w, mean_q = by_w.mean(dim=1, keepdim=True), by_q.mean(dim=1, keepdim=True)
    covariance = _mean_product(by_w, codes) - mean_w * mean_q
    variance_q = _mean_product(by_q, codes) - mean_q * mean_q
    scale = torch.where(variance_q > 0, covariance / variance_q, 0.0)
    return scale, mean_w - scale * mean_q


def unbiased_scale(groups: Tensor, codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and offset, each ``(N, 1)``, for given codes such that the gain is one: ``Cov(q', w) = Var(w)``.

    With q the least-squares fit of a group and mu its mean this is
    ``q' = mu + (q - mu) * sum h (w - mu)**2 / sum h (q - mu) (w - mu)``, h the weights, which comes down to a scale of
    ``Var(w) / Cov(codes, w)``.
    """
    by_w, by_q = (groups, codes) if weights is None else (groups * weights, codes * weights)
    mean_w, mean_q = by_w.mean(dim=1, keepdim=True), by_q.mean(dim=1, keepdim=True)
    variance_w = _mean_product(by_w, groups) - mean_w * mean_w
    covariance = _mean_product(by_w, codes) - mean_w * mean_q
    scale = torch.where(covariance > 0, variance_w / covariance, 0.0)
    return scale, mean_w - scale * mean_q


def quantize_matrix(
    weight: Tensor,
    bits: int,
    group_size: int,
    column_weights: Tensor | None = None,
    second_moment: Tensor | None = None,
) -> Quantized:
    """Quantizes one matrix, asymmetrically, in groups along its input dimension.

    Args:
        weight: ``(out, in)``, any float dtype; ``group_size`` divides ``in``.
        bits: Width of a code, 1 to 8.
        group_size: Weights that share a scale and an offset.
        column_weights: ``(in,)`` positive, how much an error in each input column counts; None for equal weights.
        second_moment: ``(in, in)`` symmetric, of the matrix's inputs: codes, scales and offsets then change the output
            as little as `round_by_moment` finds, instead of the weights. `ExpertStatistics.fit_moment` gives it.

    Returns:
        Codes ``(out, in)`` uint8, scales and offsets ``(out, in / group_size)`` float16 on the steps that
        `scales.compress` stores; the weight is ``scale * code + offset``.

    Raises:
        FitError: The weight is not finite, or too large or too small for stored scales.
        ValueError: The second moment is none.
    """
    weights = weight.unsqueeze(0)
    first = first_fit(weights, bits, group_size, None if column_weights is None else column_weights.unsqueeze(0))
    if second_moment is not None:
        return round_by_moment(weight, first.scale[0], first.offset[0], bits, second_moment)
    codes, scale, offset = as_stored(weights, first, bits)
    return codes[0], scale[0], offset[0]


def quantize_matrices(weights: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None) -> Quantized:
    """`quantize_matrix` of several matrices ``(N, out, in)``, with column weights ``(N, in)``, each on its own."""
    return as_stored(weights, first_fit(weights, bits, group_size, column_weights), bits)


class FirstFit(NamedTuple):
    """A fit before anything is rounded to what is stored.

    Attributes:
        codes: ``(N, out, in)`` uint8.
        scale: ``(N, out, in / group)`` float32.
        offset: The same shape.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


def first_fit(weights: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None) -> FirstFit:
    """Fits codes, scales and offsets to matrices ``(N, out, in)``, with column weights ``(N, in)``.

    Raises:
        FitError: A weight is not finite, or too large or too small for stored scales.
        ValueError: Column weights are none.
    """
    count, out, inp = weights.shape
    by_group = None
    if column_weights is not None:
        by_group = column_weights.to(weights.device, torch.float32).reshape(count, -1, group_size)
        if by_group.shape[1] * group_size != inp or not (by_group.isfinite() & (by_group >= 0)).all():
            raise ValueError(
                f"expected {inp} finite column weights of at least 0, got {tuple(column_weights.shape[1:])}"
            )
        sums = by_group.mean(dim=2, keepdim=True)
        by_group = torch.where(sums > 0, by_group / sums, 1.0)  # (N, in / group, group)
    rows = weights.reshape(-1, inp)  # (N * out, in)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(len(rows), inp // group_size, dtype=torch.float32, device=rows.device)
    offsets = torch.empty_like(scales)
    step = max(1, CHUNK // inp)
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        groups = rows[chunk].float().reshape(-1, group_size)  # (rows * in / group, group)
        mean = groups.mean(dim=1, keepdim=True)
        groups = groups - mean  # variances of centered groups lose no digits
        weighted = None
        if by_group is not None:
            of_row = torch.arange(start, min(start + step, len(rows)), device=rows.device) // out
            weighted = by_group[of_row].reshape(groups.shape)
        fitted = least_squares_codes(groups, bits, weighted)
        scale, offset = unbiased_scale(groups, fitted, weighted)
        scales[chunk] = scale.view(-1, inp // group_size)
        offsets[chunk] = (offset + mean).view(-1, inp // group_size)
        codes[chunk] = fitted.to(torch.uint8).view(-1, inp)
    found = FirstFit(*(one.view(count, out, -1) for one in (codes, scales, offsets)))
    lost = lost_in_float16(found.scale, found.offset, 2**bits - 1)  # tiny, huge or NaN weights
    if lost.any():
        index = int(lost.int().argmax())
        raise FitError(
            f"a weight of shape {(out, inp)} has values that float16 scales cannot hold at {bits} bits: "
            f"magnitudes up to {weights[index].abs().max().item():.3g}; leave it at 16 bits",
            index,
        )
    return found


def as_stored(weights: Tensor, first: FirstFit, bits: int) -> Quantized:
    """What is stored of a first fit of matrices ``(N, out, in)``."""
    codes, (scale, offset) = first.codes, stored_scales(first.scale, first.offset, bits)
    # where what is stored moves a code by more than half a step, code again on the stored scale
    begin = (offset - first.offset).abs()
    end = (offset - first.offset + (scale - first.scale) * (2**bits - 1)).abs()
    moved = torch.maximum(begin, end) > first.scale / 2  # (N, out, in / group)
    groups = weights.unflatten(-1, (scale.shape[-1], -1))[moved].float()  # (moved, group)
    again = _round(groups, scale[moved].float().unsqueeze(1), offset[moved].float().unsqueeze(1), 2**bits - 1)
    codes.view(*moved.shape, -1)[moved] = again.to(torch.uint8)
    return codes, scale, offset


def quantize_on_grid(weights: Tensor, bits: int, group_size: int, grid: tuple[Tensor, Tensor]) -> Quantized:
    """The codes of matrices that lie on a grid already, up to the rounding of their dtype.

    Args:
        weights: ``(..., out, in)``, any float dtype.
        bits: Width of a code.
        group_size: Weights that share a scale and an offset.
        grid: Scales and offsets, ``(..., out, in / group)`` float16 each.

    Raises:
        ValueError: A weight lies between two codes, so that either could have been meant.
    """
    scale, offset = (tensor.to(weights.device) for tensor in grid)
    codes = codes_on_grid(weights, bits, scale, offset)
    width, start = scale.float().unsqueeze(-1), offset.float().unsqueeze(-1)
    away = (codes * width + start).sub_(weights.float().unflatten(-1, (scale.shape[-1], -1))).abs_()
    if (away > torch.where(width > 0, _BETWEEN * width, start.abs() / 128)).any():
        raise ValueError(
            f"a weight of shape {tuple(weights.shape[-2:])} lies between two codes of the {bits}-bit grid: the "
            "checkpoint was saved before training ended on the grid (put SavePretrained after PrecisionAnneal), or in "
            "a dtype that cannot hold it (save in float32)"
        )
    return codes.to(torch.uint8).flatten(-2), scale, offset


def codes_on_grid(weight: Tensor, bits: int, scale: Tensor, offset: Tensor, out: Tensor | None = None) -> Tensor:
    """Nearest codes for scales and offsets that are given.

    Args:
        weight: ``(out, in)``, any float dtype.
        bits: Width of a code.
        scale: ``(out, in / group)``; 0 for a constant group.
        offset: The same shape.
        out: Where to put them, of the result's shape and dtype.

    Returns:
        ``(out, in / group, group)`` float32 of whole numbers from 0 to ``2**bits - 1``.
    """
    groups = weight.unflatten(-1, (scale.shape[-1], -1))
    scale, offset = scale.float().unsqueeze(-1), offset.float().unsqueeze(-1)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = torch.sub(groups.float(), offset, out=out)
    return codes.mul_(inverse).round_().clamp_(0, 2**bits - 1)


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(a, b).div_(a.shape[1]).unsqueeze(1)  # (N, 1)
    return found


def _round(groups: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (groups * inverse).sub_(offset * inverse).round_().clamp_(0, top)
