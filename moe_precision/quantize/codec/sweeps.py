"""Codes, scales and offsets under a second moment: rounding with feedback, and sweeps that improve what it found.

What has to be known of other columns comes from one product with the errors of all of them, a block of columns at a
time; within a block `columns` goes on. So a sweep costs one product of the second moment and the matrix, whatever it
does, and nothing has to be kept but the errors.

The functions take matrices transposed, ``(in, out)``, so that one input column is one contiguous row of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import Grid, fit_columns, move_columns, round_columns

_BLOCK = 128  # columns at a time


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
        refits: The first sweeps, in which a group's scale and offset are fitted and its codes moved, twice in turn.

    Returns:
        Codes ``(in, out)`` and their grid, never with a larger error than before.
    """
    codes, grid = codes.clone(), grid.clone()
    errors = values(codes, grid).sub_(weight)
    for number in range(sweeps):
        before = codes.clone() if refits <= number < sweeps - 1 else None
        _sweep(weight, codes, errors, grid, moment, number < refits)
        if before is not None and torch.equal(before, codes):
            break
    return codes, grid


def _sweep(weight: Tensor, codes: Tensor, errors: Tensor, grid: Grid, moment: Tensor, refits: bool) -> None:
    """Changes codes, errors and grid in place; see `descend`."""
    size = len(weight) // len(grid.scale)
    per_square = torch.where(moment.diagonal() > 0, 1 / moment.diagonal(), 0.0)
    width = max(1, _BLOCK // size) * size  # of a block, which is of whole groups
    for start in range(0, len(weight), width):
        end = min(start + width, len(weight))
        slope = moment[start:end] @ errors  # (block, out), kept up to date from here on
        for first in range(start, end, size):
            group, columns = first // size, slice(first, first + size)
            for again in (True, False) if refits else (False,):
                if refits:
                    here, own = slope[first - start :], (weight[columns], codes[columns], errors[columns])
                    change = fit_columns(*own, here[:size], moment[columns, columns], grid, group)
                    here.addmm_(moment[first:end, columns], change)
                for part in (slice(at, min(at + _BLOCK, first + size)) for at in range(first, first + size, _BLOCK)):
                    of_group = grid.scale[group], grid.inverse[group], grid.top
                    here = slope[part.start - start : part.stop - start]
                    moved = move_columns(codes[part], here, moment[part, part], per_square[part], *of_group)
                    errors[part].add_(moved)
                    needed = first if again else part.stop  # where the slope is read again
                    slope[needed - start :].addmm_(moment[needed:end, part], moved)
