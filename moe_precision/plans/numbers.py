"""Numbers as users give them: checked, and made plain Python's, so that what is checked is what is saved."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from ..errors import MoEPrecisionError


class AllocationError(MoEPrecisionError, ValueError):
    """A budget that the given widths cannot meet, or a method that lacks what it reads."""


def whole_number(name: str, value: Any) -> int:
    """A whole number as Python's int; numpy's and torch's are taken, and floats without a fraction.

    Raises:
        AllocationError: It is something else.
    """
    try:
        number = float(value)
        found = int(number)
    except (TypeError, ValueError, OverflowError):
        raise AllocationError(f"{name}={value!r}: expected a whole number") from None
    if isinstance(value, bool | str) or number != found:
        raise AllocationError(f"{name}={value!r}: expected a whole number")
    return found


def finite_number(name: str, value: Any) -> float:
    """A finite number as Python's int or float.

    Raises:
        AllocationError: It is something else.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise AllocationError(f"{name}={value!r}: expected a number") from None
    if isinstance(value, bool | str) or not math.isfinite(found):
        raise AllocationError(f"{name}={value!r}: expected a finite number")
    return value if type(value) in (int, float) else found


def exact(average_bits: float | Fraction) -> Fraction:
    """The fraction that was meant: as floats, 2.3 and 8 / 3 are not exact."""
    meant = Fraction(average_bits).limit_denominator(100_000)
    return meant if abs(float(meant) - average_bits) <= 2 * math.ulp(average_bits) else Fraction(average_bits)
