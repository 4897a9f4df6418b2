"""The widths that a plan may choose from: defaults, and what each kind of method takes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from .numbers import AllocationError, exact
from .widths import DROPPED, SCALE_AND_OFFSET_BITS, check_widths, stored_bits_per_weight

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


def nominal_bits_of(stored: float, levels: Sequence[int], group_size: int, any_levels: bool) -> float:
    """The average width that a budget with scales and offsets leaves for codes.

    Args:
        stored: Bits per weight, scales and offsets included.
        levels: Ascending.
        group_size: Weights that share a scale and an offset.
        any_levels: Whether the method knows costs, and so counts stored bits itself.

    Raises:
        AllocationError: It is less than the lowest level takes, or more than the highest; or a level is 16 bits, which
            have no scales, and the method counts nominal bits.
    """
    lowest, highest = (stored_bits_per_weight(width, group_size) for width in (levels[0], levels[-1]))
    if not exact(lowest) <= exact(stored) <= exact(highest):
        raise AllocationError(
            f"stored_bits={stored} is outside what the levels {list(levels)} take with scales and offsets, "
            f"{lowest:g} to {highest:g}; give levels around it"
        )
    if levels[-1] == 16 and not any_levels:
        raise AllocationError(
            "a method that orders experts counts nominal bits, and experts at 16 bits have no scales: give "
            "average_bits, or a method that knows costs, as curvature does"
        )
    return min(max(float(exact(stored)) - SCALE_AND_OFFSET_BITS / group_size, levels[0]), levels[-1])
