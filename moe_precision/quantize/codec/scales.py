"""Scales and offsets in eight bits each: blocks of neighboring groups share the ends of their range.

A float16 scale and offset cost 32 bits per group, 0.25 bits per weight at the default group size. Within a block of 32
groups they are alike enough for 256 steps between the least and the greatest, which costs 18 bits per group, ends
included. The codes of the weights are chosen for the scales that are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 32  # groups, in the order of a matrix's rows
BITS_PER_GROUP = 8 + 8 + 4 * 16 / BLOCK  # a scale, an offset, and their share of the ends
_TOP = 255
_WIDENED = 5  # bits


def compress(values: Tensor, rounded: Callable[[Tensor], Tensor] = torch.round) -> tuple[Tensor, Tensor]:
    """Eight-bit steps between the ends of each block's range.

    Args:
        values: ``(..., out, in / group)`` of any float dtype.
        rounded: To the nearest step, or ``torch.floor`` or ``torch.ceil``.

    Returns:
        Steps, uint8 of the same shape, and ends ``(..., blocks, 2)`` float16. What `expand` makes of them compresses
        to the same values again.
    """
    blocks = _blocks(values).float()
    least, greatest = blocks.aminmax(dim=-1, keepdim=True)  # (..., blocks, 1)
    ends = torch.cat([least, greatest], dim=-1).half()  # (..., blocks, 2)
    low, high = ends.float().unsqueeze(-2).unbind(-1)
    span = torch.where(high > low, _TOP / (high - low), 0.0)
    steps = rounded((blocks - low) * span).clamp_(0, _TOP)
    steps = torch.where(blocks == least, 0, torch.where(blocks == greatest, _TOP, steps))  # whatever the rounding
    right = _between(steps, low, high) == blocks
    for other in (steps - 1, steps + 1):  # a float16 value half way between two steps was one of them
        other = other.clamp(0, _TOP)
        better = ~right & (_between(other, low, high) == blocks)
        steps, right = torch.where(better, other, steps), right | better
    return _values(steps, values.shape).to(torch.uint8), ends


def expand(steps: Tensor, ends: Tensor) -> Tensor:
    """The float16 values of steps ``(..., out, in / group)`` uint8 and ends ``(..., blocks, 2)`` float16."""
    low, high = ends.float().unsqueeze(-2).unbind(-1)
    return _values(_between(_blocks(steps).float(), low, high), steps.shape)


def _between(steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    inner = low + (high - low) * (steps / _TOP)
    return torch.where(steps == 0, low, torch.where(steps == _TOP, high, inner)).half()


def stored_scales(scale: Tensor, offset: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scales and offsets that can be stored for those that were fitted.

    Narrow codes take the nearest. From 5 bits on the range is widened instead, so that its ends are not cut off: there
    a step of the scale is many steps of the code, and a slightly coarser code costs nothing.

    Args:
        scale: ``(out, in / group)`` float32.
        offset: ``(out, in / group)`` float32.
        bits: Width of a code.

    Returns:
        Both on steps of `compress`, float16.
    """
    if bits < _WIDENED:
        narrow = expand(*compress(torch.stack([scale, offset])))
        return narrow[0], narrow[1]
    lower = expand(*compress(offset, torch.floor))
    needed = scale + (offset - lower) / (2**bits - 1)
    return expand(*compress(needed, torch.ceil)), lower


def lost_in_float16(scale: Tensor, offset: Tensor, top: int) -> Tensor:
    """Whether the ends of a block's range, in float16, move the first or last code by more than half a step.

    Args:
        scale: ``(..., out, in / group)`` float32.
        offset: The same shape.
        top: The largest code.

    Returns:
        ``(...)`` bool: of each matrix.
    """
    (low, high), (first, last) = (_blocks(values).aminmax(dim=-1) for values in (scale, offset))
    allowed = torch.maximum(high / 2, torch.maximum(first.abs(), last.abs()) / 1024 * (high == 0))
    moved = [top * (end - end.half()).abs() for end in (low, high)]
    moved += [(end - end.half()).abs() for end in (first, last)]
    kept = torch.stack([one <= allowed for one in moved])  # (4, ..., blocks), False for NaN
    return ~kept.all(dim=-1).all(dim=0)


def blocks_of(out: int, groups: int) -> int:
    """How many blocks a matrix of ``out`` rows and ``groups`` groups per row has."""
    return -(-out * groups // BLOCK)


def _blocks(values: Tensor) -> Tensor:
    flat = values.flatten(-2)
    missing = -flat.shape[-1] % BLOCK
    flat = torch.cat([flat, flat[..., -1:].expand(*flat.shape[:-1], missing)], dim=-1) if missing else flat
    found: Tensor = flat.unflatten(-1, (-1, BLOCK))
    return found


def _values(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(-2)[..., : shape[-2] * shape[-1]].reshape(shape)
