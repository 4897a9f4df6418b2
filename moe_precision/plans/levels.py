"""The widths that a plan may choose from: defaults, and what each kind of method takes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from .numbers import AllocationError
from .widths import DROPPED, check_widths

DEFAULT_LEVELS = (1, 2, 3, 4)
DEFAULT_ORDER_LEVELS = (2, 3)  # of a method that orders experts, which takes no more than three


def check_levels(average_bits: float | Fraction, bits: Sequence[int]) -> list[int]:
    """The levels in order, after checking that they are widths around the average.

    Raises:
        AllocationError: No levels, or an average outside them.
        PlanError: A width that is not 0 to 8 or 16.
    """
    if isinstance(bits, int) or not bits:
        raise AllocationError(f"bits must list the levels to choose from, as in (2, 3); got {bits!r}")
    levels = sorted(set(bits))
    check_widths(levels)
    if not levels[0] <= average_bits <= levels[-1]:
        raise AllocationError(f"average_bits={average_bits} is outside the levels {levels}; give levels around it")
    return levels


def check_budget(average_bits: float | Fraction, bits: Sequence[int]) -> list[int]:
    """`check_levels`, and that the paper's rule takes them.

    Raises:
        AllocationError: 0 or more than three levels, unequal spacing, or an average outside the levels.
    """
    levels = check_levels(average_bits, bits)
    if DROPPED in levels:
        raise AllocationError("0 bits drop an expert, and the paper's rule cannot tell what that costs: levels from 1")
    if len(levels) > 3:
        raise AllocationError(f"the paper's rule takes one, two or three levels, got {len(levels)}: {levels}")
    if len(levels) == 3 and levels[1] - levels[0] != levels[2] - levels[1]:
        raise AllocationError(f"three levels must be equally spaced (as in 1, 2, 3 or 2, 3, 4), got {levels}")
    return levels


def order_levels(average_bits: float, levels: tuple[int, ...]) -> tuple[int, ...]:
    """The levels if a method that orders experts takes them, else the two of them around the average.

    Args:
        average_bits: Within the levels.
        levels: Ascending.
    """
    if len(levels) < 3 or (len(levels) == 3 and levels[1] - levels[0] == levels[2] - levels[1]):
        return levels
    above = next(index for index, level in enumerate(levels) if level > average_bits or level == levels[-1])
    return levels[max(above - 1, 0) : above + 1]
