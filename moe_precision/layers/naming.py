"""How users name routers and experts where structure does not show them. No torch: plans need no more of `layers`."""

from __future__ import annotations

import re
from typing import TypedDict

from ..errors import MoEPrecisionError


class MoELayerError(MoEPrecisionError, ValueError):
    """The model has no Mixture-of-Experts layer, or one that cannot be described or read without guessing."""


class Patterns(TypedDict, total=False):
    """Keywords of `find_moe_layers`; each is present only if it was given."""

    router_pattern: str
    expert_pattern: str


def check_pattern(argument: str, pattern: str | None) -> None:
    """Raises `MoELayerError` if a pattern is not a regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise MoELayerError(f"{argument}={pattern!r} is not a regular expression: {error}") from error
