"""Widths that an expert can have, what they cost in the file, and which group sizes fit a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from ..errors import MoEPrecisionError

DROPPED = 0  # the expert is dropped: nothing of its matrices is stored
WIDTHS = (DROPPED, 1, 2, 3, 4, 5, 6, 7, 8, 16)  # 16: the expert is left as it is
SCALE_AND_OFFSET_BITS = 18  # per group: quantize/codec/scales.py

Granularity = Literal["expert", "expert+projection", "layer", "layer+projection"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


class PlanError(MoEPrecisionError, ValueError):
    """A plan that is damaged, impossible, or made for another model."""


def check_widths(widths: Iterable[int]) -> None:
    """Raises `PlanError` for a width that is not 0 to 8 or 16."""
    wrong = sorted({width for width in widths if width not in WIDTHS})
    if wrong:
        raise PlanError(
            f"bits must be 1 to 8, 16 for an expert that is left alone, or 0 for one that is dropped; got {wrong}"
        )


def check_group_size(group_size: int, layer: str, projections: Mapping[str, tuple[int, int]]) -> None:
    """Checks that a group size fits every matrix of a layer.

    Args:
        group_size: Weights along the input dimension that share a scale and an offset.
        layer: Name of the layer, for the message.
        projections: Name of each matrix -> ``(out, in)``.

    Raises:
        PlanError: It is not a multiple of 8, or does not divide a matrix's input width.
    """
    _check_multiple_of_8(group_size)
    for name, (_, width) in projections.items():
        if width % group_size:
            fitting = [size for size in (128, 64, 32) if width % size == 0]
            advice = f"use {' or '.join(map(str, fitting))}" if fitting else "no group size of 32, 64 or 128 fits"
            raise PlanError(
                f"group_size={group_size} does not divide the input width {width} of {name!r} in layer {layer!r}; "
                f"{advice}"
            )


def stored_bits_per_weight(bits: int, group_size: int) -> float:
    """Bits that a weight takes in the file: its code, and its share of the group's scale and offset.

    Args:
        bits: Width of the code; 16 is stored as it is, without scales, and 0 not at all.
        group_size: Weights that share a scale and an offset.

    Raises:
        PlanError: The group size is not a multiple of 8.
    """
    _check_multiple_of_8(group_size)
    return float(bits) if bits in (DROPPED, 16) else bits + SCALE_AND_OFFSET_BITS / group_size


def _check_multiple_of_8(group_size: int) -> None:
    if group_size < 8 or group_size % 8:
        raise PlanError(f"group_size={group_size} is not a positive multiple of 8; use 32, 64 or 128")
