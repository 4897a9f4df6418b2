"""Codes, scales and offsets under a second moment: rounding with feedback, and sweeps that improve what it found.

What has to be known of other columns comes from one product with the errors of all of them, a block of columns at a
time; within a block `columns` goes on. So a sweep costs one product of the second moment and the matrix, whatever it
does, and nothing has to be kept but the errors.

The functions take matrices transposed, ``(in, out)``, so that one input column is one contiguous row of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import Grid, inverse_of, move_columns, round_columns

_BLOCK = 128  # columns at a time
_RIDGE = 1e-3


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest codes ``(in, out)`` float32 for a weight ``(in, out)``."""
    groups = weight.unflatten(0, (len(grid.scale), -1))  # (in / group, group, out)
    codes: Tensor = (groups - grid.offset.unsqueeze(1)).mul_(grid.inverse.unsqueeze(1)).round_()
    return codes.clamp_(0, grid.top).flatten(0, 1)


def values(codes: Tensor, grid: Grid) -> Tensor:
    """The quantized values ``(in, out)`` float32 of codes ``(in, out)``."""
    groups = codes.unflatten(0, (len(grid.scale), -1))
    found: Tensor = (groups * grid.scale.unsqueeze(1)).add_(grid.offset.unsqueeze(1)).flatten(0, 1)
    return found


def feedback(weight: Tensor, grid: Grid, order: Tensor, factor: Tensor) -> Tensor:
    """Rounds column after column; those that follow make good what each has changed in the output.

    Args:
        weight: ``(in, out)`` float32.
        grid: Scales and offsets.
        order: ``(in,)``, see `rounding.feedback_factor`.
        factor: ``(in, in)``.

    Returns:
        Codes ``(in, out)`` float32.
    """
    groups = order // (len(weight) // len(grid.scale))
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)  # errors in the order of rounding
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, start + _BLOCK)
        own = weight[order[block]]  # (block, out)
        left = torch.addmm(own, factor[block, :start], errors[:start], alpha=-1)
        codes[order[block]], errors[block] = round_columns(own, left, factor[block, block], groups[block], grid)
    return codes


def descend(
    weight: Tensor, codes: Tensor, grid: Grid, moment: Tensor, sweeps: int, refits: int = 0
) -> tuple[Tensor, Grid]:
    """Moves each code to its best value while the others stay, column by column, until none changes.

    Args:
        weight: ``(in, out)`` float32.
        codes: ``(in, out)`` float32, left as they are.
        grid: Scales and offsets, left as they are.
        moment: ``(in, in)`` float32, symmetric.
        sweeps: Over all columns, at most.
        refits: Sweeps, the first, in which each group's scale and offset are fitted before its codes move.

    Returns:
        Codes ``(in, out)`` and their grid, never with a larger error than before.
    """
    size = len(weight) // len(grid.scale)
    codes, grid = codes.clone(), grid.clone()
    per_square = torch.where(moment.diagonal() > 0, 1 / moment.diagonal(), 0.0)
    errors = values(codes, grid).sub_(weight)
    width = max(1, _BLOCK // size) * size  # of a block, which is of whole groups
    for number in range(sweeps):
        before = codes.clone() if refits <= number < sweeps - 1 else None
        for start in range(0, len(weight), width):
            end = min(start + width, len(weight))
            slope = moment[start:end] @ errors  # (block, out), kept up to date from here on
            for first in range(start, end, size):
                group, columns = first // size, slice(first, first + size)
                if number < refits:
                    own, here = moment[columns, columns], slope[first - start : first - start + size]
                    scale, offset = refit(codes[columns], here, own, grid.scale[group], grid.offset[group])
                    grid.scale[group], grid.offset[group], grid.inverse[group] = scale, offset, inverse_of(scale)
                    fitted = torch.mul(codes[columns], scale).add_(offset).sub_(weight[columns])
                    slope[first - start :].addmm_(moment[first:end, columns], errors[columns].neg_().add_(fitted))
                    errors[columns] = fitted
                for part in (slice(at, min(at + _BLOCK, first + size)) for at in range(first, first + size, _BLOCK)):
                    moved = move_columns(
                        codes[part],
                        slope[part.start - start : part.stop - start],
                        moment[part, part],
                        per_square[part],
                        grid.scale[group],
                        grid.inverse[group],
                        grid.top,
                    )
                    slope[part.stop - start :].addmm_(moment[part.stop : end, part], moved)
                    errors[part].add_(moved)
        if before is not None and torch.equal(before, codes):
            break
    return codes, grid


def refit(
    codes: Tensor, slope: Tensor, moment: Tensor, scale: Tensor, offset: Tensor, ridge: float = _RIDGE
) -> tuple[Tensor, Tensor]:
    """Least squares under the second moment for one group's scale and offset, while the other groups stay.

    Args:
        codes: ``(group, out)`` float32.
        slope: The same shape: the second moment times the errors of all columns.
        moment: ``(group, group)`` float32, symmetric.
        scale: ``(out,)`` float32.
        offset: The same shape.
        ridge: Shortens the step; 0 for the least squares.

    Returns:
        Scale and offset: as they were where the new scale would not be positive, or more than three times as large.
    """
    by_code = moment @ codes  # (group, out)
    square, mixed = (by_code * codes).sum(0) * (1 + ridge), by_code.sum(0)  # (out,)
    ones = moment.sum() * (1 + ridge)
    by_scale, by_offset = (slope * codes).sum(0), slope.sum(0)
    determinant = square * ones - mixed * mixed
    wider = (mixed * by_offset - ones * by_scale) / determinant
    higher = (mixed * by_scale - square * by_offset) / determinant
    new = scale + wider
    taken = (determinant > 1e-6 * square * ones) & (new > 0) & (new <= 3 * scale)
    return torch.where(taken, new, scale), torch.where(taken, offset + higher, offset)
