"""Fits codes, scales and offsets to a weight matrix: least squares with an unbiased gain, one group at a time.

A plain least-squares fit has the lowest weight error, but each group of it is a conditional mean: every output of the
layer shrinks by the same relative error, and so on through the depth of the model. Making the gain unbiased costs a
little weight error and repairs the loss, at 1 and 2 bits above all.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STARTS = (1.0, 0.9, 0.8, 0.6)  # shares of a group's range that the iteration starts from; the best end wins
_ITERATIONS = 6
_CHUNK = 1 << 18  # weights fitted at a time: bounds the memory and stays in cache


def least_squares_codes(groups: Tensor, bits: int) -> Tensor:
    """Alternates between rounding to codes and regressing the weights on them, from several starts.

    Args:
        groups: ``(N, group)`` float32, one group a row.
        bits: Width of a code.

    Returns:
        ``(N, group)`` float32 of whole numbers from 0 to ``2**bits - 1``: the codes with the least squared error.
    """
    top = 2**bits - 1
    low, high = groups.aminmax(dim=1, keepdim=True)  # (N, 1)
    best = best_error = None
    for share in _STARTS if bits <= 4 else _STARTS[:1]:  # above 4 bits clipping never pays
        scale = (high - low) * (share / top)
        codes = _round(groups, scale, (low + high) / 2 - scale * (top / 2), top)
        for _ in range(_ITERATIONS):
            scale, offset = least_squares_scale(groups, codes)
            codes = _round(groups, scale, offset, top)
        scale, offset = least_squares_scale(groups, codes)
        residual = (codes * scale).add_(offset).sub_(groups)
        error = _mean_product(residual, residual)
        if best is None or best_error is None:
            best, best_error = codes, error
        else:
            best = torch.where(error < best_error, codes, best)
            best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def least_squares_scale(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, each ``(N, 1)``, with the least squared error for given codes; scale 0 for constant groups."""
    mean_w, mean_q = groups.mean(dim=1, keepdim=True), codes.mean(dim=1, keepdim=True)
    covariance = _mean_product(groups, codes) - mean_w * mean_q
    variance_q = _mean_product(codes, codes) - mean_q * mean_q
    scale = torch.where(variance_q > 0, covariance / variance_q, 0.0)
    return scale, mean_w - scale * mean_q


def unbiased_scale(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, each ``(N, 1)``, for given codes such that the gain is one: ``Cov(q', w) = Var(w)``.

    With q the least-squares fit of a group and mu its mean this is
    ``q' = mu + (q - mu) * sum((w - mu)**2) / sum((q - mu) * (w - mu))``, which comes down to a scale of
    ``Var(w) / Cov(codes, w)``.
    """
    mean_w, mean_q = groups.mean(dim=1, keepdim=True), codes.mean(dim=1, keepdim=True)
    covariance = _mean_product(groups, codes) - mean_w * mean_q
    variance_w = _mean_product(groups, groups) - mean_w * mean_w
    scale = torch.where(covariance > 0, variance_w / covariance, 0.0)
    return scale, mean_w - scale * mean_q


def quantize_matrix(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes one matrix, asymmetrically, in groups along its input dimension.

    Args:
        weight: ``(out, in)``, any float dtype; ``group_size`` divides ``in``.
        bits: Width of a code, 1 to 8.
        group_size: Weights that share a scale and an offset.

    Returns:
        Codes ``(out, in)`` uint8, scales and offsets ``(out, in / group_size)`` float16; the weight is
        ``scale * code + offset``.

    Raises:
        ValueError: The weight is not finite, or too large or small for float16 scales.
    """
    out, inp = weight.shape
    codes = torch.empty(out, inp, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out, inp // group_size, dtype=torch.float16, device=weight.device)
    offsets = torch.empty_like(scales)
    rows = max(1, _CHUNK // inp)
    for start in range(0, out, rows):
        chunk = slice(start, start + rows)
        groups = weight[chunk].float().reshape(-1, group_size)  # (rows * in / group, group)
        fitted = least_squares_codes(groups, bits)
        scale, offset = unbiased_scale(groups, fitted)
        codes[chunk] = fitted.to(torch.uint8).view(-1, inp)
        scales[chunk] = scale.view(-1, inp // group_size)
        offsets[chunk] = offset.view(-1, inp // group_size)
    if not (scales.isfinite().all() and offsets.isfinite().all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has values that are not finite or exceed what float16 scales "
            f"hold (largest magnitude {weight.abs().max().item():.3g}); such an expert must stay at 16 bits"
        )
    return codes, scales, offsets


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).div_(a.shape[1]).unsqueeze(1)  # (N, 1)


def _round(groups: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (groups * inverse).sub_(offset * inverse).round_().clamp_(0, top)
