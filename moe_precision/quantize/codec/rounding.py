"""Rounds a matrix by what its inputs have in common: codes, scales and offsets under the second moment of the inputs.

With ``H`` the second moment of a matrix's inputs, quantizing a row ``v`` to ``q`` changes its output by
``(q - v) H (q - v)^T`` on average. Errors in columns that move together add up or cancel, which a fit of one group at a
time cannot see.

1. Columns are rounded one after the other, those with the largest inputs first. The columns that follow make good what
   each rounding has changed in the output (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304).
2. Each code moves to its best value while the others stay (QuantEase, arXiv 2309.01885).
3. Scales and offsets are fitted to the codes again, group by group under ``H`` (arXiv 2602.02126).

The functions take matrices transposed, ``(in, out)``, so that one input column is one contiguous row of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scales import lost_in_float16, stored_scales

Fitted = tuple[Tensor, Tensor, Tensor]  # codes (out, in) float32, scales and offsets (out, in / group) float16

_DAMPING = (0.01, 0.1)  # of the mean of the diagonal, added to it before the factorization; the second if it fails
_BLOCK = 128  # columns whose updates wait for one matrix product
_CHUNK = 1 << 22  # weights rounded at a time: bounds the memory
_SWEEPS = 3
_REFITS = 2
_RIDGE = 1e-3
_ASYMMETRY = 1e-3  # of the largest value; from half precision
_NEGATIVE = 1e-2  # of the largest eigenvalue; from half precision too


def round_by_moment(weight: Tensor, scale: Tensor, offset: Tensor, bits: int, second_moment: Tensor) -> Fitted:
    """Codes, scales and offsets that change the matrix's output little, from a first fit of scales and offsets.

    Rounds with feedback, then alternates between the codes (descent) and the scales (refits). After that each row is
    multiplied by half of what would make its gain one, scales and offsets are rounded to what is stored, and the codes
    are found once more on that grid.

    Args:
        weight: ``(out, in)``, any float dtype.
        scale: ``(out, in / group)`` float32, of a fit without the second moment.
        offset: The same shape.
        bits: Width of a code.
        second_moment: ``(in, in)``, see `check_moment`; its scale does not matter.

    Raises:
        ValueError: The second moment is none.
    """
    moment = check_moment(second_moment.to(weight.device, torch.float32), weight.shape[1])
    factored = inverse_factor(moment)
    rows = [slice(start, start + _rows(weight)) for start in range(0, len(weight), _rows(weight))]
    found_scale, found_offset = torch.empty_like(scale), torch.empty_like(offset)
    for chunk in rows:
        matrix = weight[chunk].float().T.contiguous()  # (in, rows)
        grid = scale[chunk].T.contiguous(), offset[chunk].T.contiguous()
        codes = _round(matrix, *grid, bits, moment, factored)
        for _ in range(_REFITS):
            grid = refit(matrix, codes, *grid, moment)
            codes = descend(matrix, codes, *grid, bits, moment)
        gain = half_gain(matrix, codes, *grid, moment)
        found_scale[chunk], found_offset[chunk] = (grid[0] * gain).T, (grid[1] * gain).T
    if lost_in_float16(found_scale, found_offset, 2**bits - 1):
        found_scale, found_offset = scale, offset
    stored = stored_scales(found_scale, found_offset, bits)
    found = torch.empty(weight.shape, device=weight.device)
    for chunk in rows:
        matrix = weight[chunk].float().T.contiguous()
        grid = stored[0][chunk].float().T.contiguous(), stored[1][chunk].float().T.contiguous()
        found[chunk] = _round(matrix, *grid, bits, moment, factored).T
    return found, *stored


def _rows(weight: Tensor) -> int:
    return max(_BLOCK, _CHUNK // weight.shape[1])


def _round(
    weight: Tensor, scale: Tensor, offset: Tensor, bits: int, moment: Tensor, factored: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Feedback and descent; descent alone, from the nearest codes, where there is no factor."""
    if factored is None:
        codes = nearest(weight, scale, offset, bits)
    else:
        codes = feedback(weight, scale, offset, bits, *factored)
    return descend(weight, codes, scale, offset, bits, moment)


def check_moment(moment: Tensor, width: int) -> Tensor:
    """A second moment ``(in, in)`` float32, made symmetric and scaled to a mean of 1 on its diagonal.

    Raises:
        ValueError: It has another shape, is not finite or not symmetric, or has a negative value on its diagonal or no
            positive one. What is indefinite in another way shows in `inverse_factor`.
    """
    if moment.shape != (width, width):
        raise ValueError(f"the second moment has shape {tuple(moment.shape)}, expected ({width}, {width})")
    if not moment.isfinite().all():
        raise ValueError(f"the second moment holds {int((~moment.isfinite()).sum())} values that are not finite")
    diagonal = moment.diagonal()
    if (diagonal < 0).any() or not (diagonal > 0).any():
        raise ValueError(
            f"the second moment has a diagonal from {float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}, "
            "expected mean squares of inputs: at least 0, and not all of them 0"
        )
    mean = diagonal.mean()
    asymmetry = float((moment - moment.T).abs().max() / diagonal.max())
    if asymmetry > _ASYMMETRY:
        raise ValueError(f"the second moment differs from its transpose by {asymmetry:.2%} of its largest value")
    return (moment + moment.T) / (2 * mean)


def inverse_factor(moment: Tensor) -> tuple[Tensor, Tensor] | None:
    """The order in which columns are rounded, and how an error in one is made good by those that follow.

    Args:
        moment: ``(in, in)`` float32, as `check_moment` gives it.

    Returns:
        Column indices ``(in,)`` int64 by falling diagonal, and the upper Cholesky factor ``(in, in)`` of the damped
        inverse in that order. None where float32 cannot factorize it, damped by a hundredth or a tenth.

    Raises:
        ValueError: An eigenvalue is more negative than rounding explains.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    ordered, mean = moment[order][:, order], moment.diagonal().mean()
    for damping in _DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return order, upper
    values = torch.linalg.eigvalsh(moment)
    least, largest = float(values[0]), float(values[-1])
    if least < -_NEGATIVE * largest:
        raise ValueError(
            f"the second moment has eigenvalues from {least:.3g} to {largest:.3g} where the mean of its diagonal is "
            f"{float(mean):.3g}, expected none below 0"
        )
    return None


def nearest(weight: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Nearest codes ``(in, out)`` float32 for a weight ``(in, out)`` and its grid, each ``(in / group, out)``."""
    groups = weight.unflatten(0, (len(scale), -1))  # (in / group, group, out)
    codes: Tensor = (groups - offset.unsqueeze(1)).mul_(_inverse(scale).unsqueeze(1)).round_()
    return codes.clamp_(0, 2**bits - 1).flatten(0, 1)


def feedback(weight: Tensor, scale: Tensor, offset: Tensor, bits: int, order: Tensor, factor: Tensor) -> Tensor:
    """Rounds column after column; those that follow make good what each has changed in the output.

    Args:
        weight: ``(in, out)`` float32.
        scale: ``(in / group, out)`` float32; 0 for a constant group.
        offset: The same shape.
        bits: Width of a code.
        order: ``(in,)``, see `inverse_factor`.
        factor: ``(in, in)``.

    Returns:
        Codes ``(in, out)`` float32.
    """
    size, top = len(weight) // len(scale), 2**bits - 1
    inverse = _inverse(scale)
    groups = (order // size).tolist()
    left = weight[order]  # what is still to be rounded
    codes = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(left)))
        rest, own = left[block], factor[block, block]
        errors = torch.empty_like(rest)
        for index, group in enumerate(groups[block]):
            code = torch.sub(rest[index], offset[group]).mul_(inverse[group]).round_().clamp_(0, top)
            codes[start + index] = code
            error = torch.sub(rest[index], torch.addcmul(offset[group], code, scale[group])).div_(own[index, index])
            errors[index] = error
            rest[index + 1 :].addr_(own[index, index + 1 :], error, alpha=-1)
        left[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found


def descend(
    weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, moment: Tensor, sweeps: int = _SWEEPS
) -> Tensor:
    """Moves each code to its best value while the others stay, column by column, until none changes.

    Args:
        weight: ``(in, out)`` float32.
        codes: ``(in, out)`` float32, left as they are.
        scale: ``(in / group, out)`` float32; 0 for a constant group.
        offset: The same shape.
        bits: Width of a code.
        moment: ``(in, in)`` float32, symmetric.
        sweeps: Over all columns, at most.

    Returns:
        Codes ``(in, out)``, never with a larger error than before.
    """
    size, top = len(weight) // len(scale), 2**bits - 1
    inverse, codes = _inverse(scale), codes.clone()
    per_square = torch.where(moment.diagonal() > 0, 1 / moment.diagonal(), 0.0)
    slope = moment @ (_values(codes, scale, offset) - weight)  # (in, out)
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, len(codes), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(codes)))
            own, here = moment[block, block], slope[block].clone()
            moved = torch.empty_like(here)
            for index in range(len(here)):
                group, old = (start + index) // size, codes[start + index]
                step = torch.mul(here[index], per_square[start + index]).mul_(inverse[group])
                code = torch.sub(old, step).round_().clamp_(0, top)
                torch.sub(code, old, out=moved[index]).mul_(scale[group])
                codes[start + index] = code
                here.addr_(own[index], moved[index])
            slope.addmm_(moment[:, block], moved)
        if torch.equal(before, codes):
            break
    return codes


def refit(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    moment: Tensor,
    sweeps: int = 2,
    ridge: float = _RIDGE,
) -> tuple[Tensor, Tensor]:
    """Least squares under the second moment for each group's scale and offset in turn, while the other groups stay.

    Args:
        weight: ``(in, out)`` float32.
        codes: ``(in, out)`` float32.
        scale: ``(in / group, out)`` float32, left as it is.
        offset: The same shape.
        moment: ``(in, in)`` float32, symmetric.
        sweeps: Over all groups.
        ridge: Shortens each step; 0 for the least squares of a group.

    Returns:
        Scale and offset. A group keeps its own where the new scale would not be positive, or more than three times as
        large.
    """
    size = len(weight) // len(scale)
    scale, offset = scale.clone(), offset.clone()
    slope = moment @ (_values(codes, scale, offset) - weight)  # (in, out)
    for _ in range(sweeps):
        for group in range(len(scale)):
            rows = slice(group * size, (group + 1) * size)
            own, code = moment[rows, rows], codes[rows]
            by_code, here = own @ code, slope[rows]  # (group, out)
            square, mixed = (by_code * code).sum(0) * (1 + ridge), by_code.sum(0)  # (out,)
            ones = own.sum() * (1 + ridge)
            by_scale, by_offset = (here * code).sum(0), here.sum(0)
            determinant = square * ones - mixed * mixed
            wider = (mixed * by_offset - ones * by_scale) / determinant
            higher = (mixed * by_scale - square * by_offset) / determinant
            new = scale[group] + wider
            taken = (determinant > 1e-6 * square * ones) & (new > 0) & (new <= 3 * scale[group])
            wider, higher = torch.where(taken, wider, 0.0), torch.where(taken, higher, 0.0)
            scale[group] += wider
            offset[group] += higher
            slope.addmm_(moment[:, rows], code * wider + higher)
    return scale, offset


def half_gain(weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, moment: Tensor) -> Tensor:
    """Half of what makes a row's gain one under the second moment, ``(v H v^T / v H q^T) ** (1/2)``, ``(out,)``.

    Codes that fit best have a gain below one, as in `fitting`. At 1 bit half of the correction loses least.
    """
    by_weight = moment @ weight
    own, shared = (by_weight * weight).sum(0), (by_weight * _values(codes, scale, offset)).sum(0)
    return torch.where(shared > 0, (own / shared).clamp(0.25, 4), 1.0).sqrt()


def _values(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    groups: Tensor = codes.unflatten(0, (len(scale), -1))
    return torch.addcmul(offset.unsqueeze(1), groups, scale.unsqueeze(1)).flatten(0, 1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)
