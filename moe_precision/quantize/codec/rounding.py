"""Rounds a matrix by what its inputs have in common: codes, scales and offsets under the second moment of the inputs.

With ``H`` the second moment of a matrix's inputs, quantizing a row ``v`` to ``q`` changes its output by
``(q - v) H (q - v)^T`` on average. Errors in columns that move together add up or cancel, which a fit of one group at a
time cannot see.

1. Columns are rounded one after the other, those with the largest inputs first. The columns that follow make good what
   each rounding has changed in the output (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304).
2. Scales and offsets are fitted to the codes again, group by group under ``H`` (arXiv 2602.02126).
3. Each code moves to its best value while the others stay (QuantEase, arXiv 2309.01885).

The second and third step are one sweep over the groups (`sweeps`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import MoEPrecisionError
from .columns import Grid
from .scales import lost_in_float16, stored_scales
from .sweeps import descend, feedback, nearest, values

Fitted = tuple[Tensor, Tensor, Tensor]  # codes (out, in) uint8, scales and offsets (out, in / group) float16

_DAMPING = (0.01, 0.1)  # of the mean of the diagonal, added to it before the factorization; the second if it fails
_CHUNK = 1 << 22  # weights rounded at a time: bounds the memory
_STRIPE = 512  # columns of a second moment at a time
_SWEEPS = 2, 1  # of scales, offsets and codes; of codes alone, on the stored grid
_ANEW = 5  # bits from which codes on the stored grid do not start from those before
_SWEEPS_ANEW = 1, 2
_ASYMMETRY = 1e-3  # of the largest value; from half precision
_NEGATIVE = 1e-2  # of the largest eigenvalue; from half precision too


class IndefiniteError(MoEPrecisionError, ValueError):
    """A second moment with eigenvalues below zero, which no inputs have."""


def round_by_moment(weight: Tensor, scale: Tensor, offset: Tensor, bits: int, second_moment: Tensor) -> Fitted:
    """Codes, scales and offsets that change the matrix's output little, from a first fit of scales and offsets.

    Rounds with feedback, then sweeps over the groups, fitting scales and codes in turn. After that each row is
    multiplied by half of what would make its gain one, and scales and offsets are rounded to what is stored. What was
    found is rounded to that grid, again with feedback, so that few codes change; from 5 bits on the weight itself is,
    since there a step of the stored scales is several of the codes. A last sweep moves the codes.

    Args:
        weight: ``(out, in)``, any float dtype.
        scale: ``(out, in / group)`` float32, of a fit without the second moment.
        offset: The same shape.
        bits: Width of a code.
        second_moment: ``(in, in)``, see `check_moment`; its scale does not matter.

    Raises:
        ValueError: The second moment is none.
        IndefiniteError: Likewise, by its eigenvalues.
    """
    moment = check_moment(second_moment.to(weight.device, torch.float32), weight.shape[1])
    factored = feedback_factor(moment)
    refits, sweeps = _SWEEPS if bits < _ANEW else _SWEEPS_ANEW
    rows = max(128, _CHUNK // weight.shape[1])
    chunks = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    found = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    found_scale, found_offset = torch.empty_like(scale), torch.empty_like(offset)
    for chunk in chunks:
        matrix = weight[chunk].float().T.contiguous()  # (in, rows)
        grid = _grid(scale[chunk], offset[chunk], bits)
        codes, grid = descend(matrix, _start(matrix, grid, factored), grid, moment, refits, refits)
        gain = half_gain(matrix, codes, grid, moment)
        found_scale[chunk], found_offset[chunk] = (grid.scale * gain).T, (grid.offset * gain).T
        found[chunk] = codes.T
    fits = not lost_in_float16(found_scale, found_offset, 2**bits - 1)
    stored = stored_scales(*((found_scale, found_offset) if fits else (scale, offset)), bits)
    for chunk in chunks:
        matrix, grid = weight[chunk].float().T.contiguous(), _grid(stored[0][chunk], stored[1][chunk], bits)
        wanted = matrix
        if fits and bits < _ANEW:
            wanted = values(found[chunk].T.float().contiguous(), _grid(found_scale[chunk], found_offset[chunk], bits))
        codes, _ = descend(matrix, _start(wanted, grid, factored), grid, moment, sweeps)
        found[chunk] = codes.T
    return found, *stored


def _grid(scale: Tensor, offset: Tensor, bits: int) -> Grid:
    return Grid.of(scale.float().T.contiguous(), offset.float().T.contiguous(), bits)


def _start(weight: Tensor, grid: Grid, factored: tuple[Tensor, Tensor] | None) -> Tensor:
    """Codes by feedback; the nearest where there is no factor."""
    return nearest(weight, grid) if factored is None else feedback(weight, grid, *factored)


def check_moment(moment: Tensor, width: int) -> Tensor:
    """A second moment ``(in, in)`` float32, made symmetric and scaled to a mean of 1 on its diagonal.

    Raises:
        ValueError: It has another shape, is not finite or not symmetric, or has a negative value on its diagonal or no
            positive one. What is indefinite in another way shows in `feedback_factor`.
    """
    if moment.shape != (width, width):
        raise ValueError(f"the second moment has shape {tuple(moment.shape)}, expected ({width}, {width})")
    if not moment.sum().isfinite() and not moment.isfinite().all():
        raise ValueError(f"the second moment holds {int((~moment.isfinite()).sum())} values that are not finite")
    diagonal = moment.diagonal()
    if (diagonal < 0).any() or not (diagonal > 0).any():
        raise ValueError(
            f"the second moment has a diagonal from {float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}, "
            "expected mean squares of inputs: at least 0, and not all of them 0"
        )
    symmetric, asymmetry = torch.empty_like(moment), 0.0
    halved = 1 / (2 * diagonal.mean())
    for start in range(0, width, _STRIPE):
        one = slice(start, start + _STRIPE)
        other = moment[:, one].T.contiguous()
        torch.add(moment[one], other, out=symmetric[one]).mul_(halved)
        asymmetry = max(asymmetry, float(other.sub_(moment[one]).abs_().max() / diagonal.max()))
    if asymmetry > _ASYMMETRY:
        raise ValueError(f"the second moment differs from its transpose by {asymmetry:.2%} of its largest value")
    return symmetric


def feedback_factor(moment: Tensor) -> tuple[Tensor, Tensor] | None:
    """The order in which columns are rounded, and how an error in one is made good by those that follow.

    With ``H = R D R^T``, ``R`` upper triangular with ones on its diagonal, a column makes good its errors in the
    columns before it by ``R``. This is what GPTQ finds from the Cholesky factor of the inverse of ``H``
    (shown in arXiv 2307.13304), without the inverse.

    Args:
        moment: ``(in, in)`` float32, as `check_moment` gives it.

    Returns:
        Column indices ``(in,)`` int64 by falling diagonal, and the transpose of ``R`` ``(in, in)`` of the damped second
        moment in that order. None where float32 cannot factorize it, damped by a hundredth or a tenth.

    Raises:
        IndefiniteError: An eigenvalue is more negative than rounding explains.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    ordered, mean = moment[backwards.unsqueeze(1), backwards], moment.diagonal().mean()
    damped = 0.0
    for damping in _DAMPING:
        ordered.diagonal().add_((damping - damped) * mean)
        damped = damping
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            del ordered
            factor = lower.T.flip(0, 1)
            return order, factor.div_(factor.diagonal().unsqueeze(1).clone())
    values = torch.linalg.eigvalsh(moment)
    least, largest = float(values[0]), float(values[-1])
    if least < -_NEGATIVE * largest:
        raise IndefiniteError(
            f"the second moment has eigenvalues from {least:.3g} to {largest:.3g} where the mean of its diagonal is "
            f"{float(mean):.3g}, expected none below 0"
        )
    return None


def half_gain(weight: Tensor, codes: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    """Half of what makes a row's gain one under the second moment, ``(v H v^T / v H q^T) ** (1/2)``, ``(out,)``.

    Codes that fit best have a gain below one, as in `fitting`. At 1 bit half of the correction loses least.
    """
    own, shared = torch.zeros_like(weight[0]), torch.zeros_like(weight[0])
    quantized = values(codes, grid)
    for start in range(0, len(weight), _STRIPE):
        rows = slice(start, start + _STRIPE)
        by_weight = moment[rows] @ weight
        own += (by_weight * weight[rows]).sum(0)
        shared += by_weight.mul_(quantized[rows]).sum(0)
    return torch.where(shared > 0, (own / shared).clamp(0.25, 4), 1.0).sqrt()
