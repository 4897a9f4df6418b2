"""Fits codes, scales and offsets to a weight matrix: least squares with an unbiased gain, one group at a time.

A plain least-squares fit has the lowest weight error, but each group of it is a conditional mean: every output of the
layer shrinks by the same relative error, and so on through the depth of the model. Making the gain unbiased costs a
little weight error and repairs the loss, above all at 1 and 2 bits.

Where the curvature of the loss is known, it weights each input column in the fit. Where the second moment of the inputs
is known, this fit is where `rounding` starts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rounding import round_by_moment
from .scales import lost_in_float16, stored_scales

Quantized = tuple[Tensor, Tensor, Tensor]  # codes (out, in) uint8, scales and offsets (out, in / group) float16
Fit = Callable[[Tensor, int, int], Quantized]  # of a weight, a width and a group size

_ITERATIONS = 20
_BETWEEN = 0.45  # of a step, from the nearest code
_CHUNK = 1 << 18  # weights fitted at a time: bounds the memory and stays in cache


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
        ValueError: The weight is not finite, or too large or too small for stored scales; or the second moment is none.
    """
    out, inp = weight.shape
    codes = torch.empty(out, inp, dtype=torch.uint8, device=weight.device)
    fitted_scale = torch.empty(out, inp // group_size, dtype=torch.float32, device=weight.device)
    fitted_offset = torch.empty_like(fitted_scale)
    by_group = None
    if column_weights is not None:
        by_group = column_weights.to(weight.device, torch.float32).reshape(-1, group_size)  # (in / group, group)
        if by_group.numel() != inp or not (by_group.isfinite() & (by_group >= 0)).all():
            raise ValueError(f"expected {inp} finite column weights of at least 0, got {tuple(column_weights.shape)}")
        sums = by_group.mean(dim=1, keepdim=True)
        by_group = torch.where(sums > 0, by_group / sums, 1.0)
    rows = max(1, _CHUNK // inp)
    for start in range(0, out, rows):
        chunk = slice(start, start + rows)
        groups = weight[chunk].float().reshape(-1, group_size)  # (rows * in / group, group)
        mean = groups.mean(dim=1, keepdim=True)
        groups = groups - mean  # variances of centered groups lose no digits
        weights = None if by_group is None else by_group.repeat(len(groups) // len(by_group), 1)
        fitted = least_squares_codes(groups, bits, weights)
        scale, offset = unbiased_scale(groups, fitted, weights)
        fitted_scale[chunk] = scale.view(-1, inp // group_size)
        fitted_offset[chunk] = (offset + mean).view(-1, inp // group_size)
        codes[chunk] = fitted.to(torch.uint8).view(-1, inp)
    if lost_in_float16(fitted_scale, fitted_offset, 2**bits - 1):  # tiny, huge or NaN weights
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has values that float16 scales cannot hold at {bits} bits: "
            f"magnitudes up to {weight.abs().max().item():.3g}; leave it at 16 bits"
        )
    if second_moment is not None:
        return round_by_moment(weight, fitted_scale, fitted_offset, bits, second_moment)
    scale, offset = stored_scales(fitted_scale, fitted_offset, bits)
    # where what is stored moves a code by more than half a step, code again on the stored scale
    first = (offset - fitted_offset).abs()
    last = (offset - fitted_offset + (scale - fitted_scale) * (2**bits - 1)).abs()
    moved = torch.maximum(first, last) > fitted_scale / 2  # (out, in / group)
    groups = weight.unflatten(1, (-1, group_size))[moved].float()  # (N, group)
    again = _round(groups, scale[moved].float().unsqueeze(1), offset[moved].float().unsqueeze(1), 2**bits - 1)
    codes.view(*moved.shape, group_size)[moved] = again.to(torch.uint8)
    return codes, scale, offset


def quantize_on_grid(weight: Tensor, bits: int, group_size: int, grid: tuple[Tensor, Tensor]) -> Quantized:
    """The codes of a matrix that lies on a grid already, up to the rounding of its dtype.

    Args:
        weight: ``(out, in)``, any float dtype.
        bits: Width of a code.
        group_size: Weights that share a scale and an offset.
        grid: Scales and offsets, ``(out, in / group)`` float16 each.

    Raises:
        ValueError: A weight lies between two codes, so that either could have been meant.
    """
    scale, offset = (tensor.to(weight.device) for tensor in grid)
    codes = codes_on_grid(weight, bits, scale, offset)
    width, start = scale.float().unsqueeze(-1), offset.float().unsqueeze(-1)
    away = (codes * width + start).sub_(weight.float().unflatten(-1, (scale.shape[-1], -1))).abs_()
    if (away > torch.where(width > 0, _BETWEEN * width, start.abs() / 128)).any():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} lies between two codes of the {bits}-bit grid: the checkpoint "
            "was saved before training ended on the grid (put SavePretrained after PrecisionAnneal), or in a dtype "
            "that cannot hold it (save in float32)"
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
