"""0 bits, which drop an expert: what may be asked for, and what a plan may do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .methods import AUTO, DROPPING_METHODS
from .numbers import AllocationError
from .widths import DROPPED, PlanError


def check_dropping(method: str, granularity: str, levels: Sequence[int], max_dropped: float, min_tokens: int) -> None:
    """Checks settings with 0 among their levels; arguments as in `PlanSettings`.

    Raises:
        AllocationError: No expert could be dropped for a reason under them.
    """
    if method not in (AUTO, *DROPPING_METHODS):
        raise AllocationError(
            f"0 bits drop an expert, and method {method!r} cannot tell what that costs: expected "
            f"{' or '.join(DROPPING_METHODS)}, or levels from 1"
        )
    if not granularity.startswith("expert"):
        raise AllocationError(f"0 bits drop single experts, which granularity={granularity!r} cannot express")
    if len(levels) == 1:
        raise AllocationError("bits has 0 alone: that would drop all experts; give the widths of the others too")
    if not 0 < max_dropped < 1:
        raise AllocationError(f"max_dropped={max_dropped}: expected a share of a layer's experts, between 0 and 1")
    if min_tokens < 0:
        raise AllocationError(f"min_tokens={min_tokens}: expected a number of tokens, 0 or more")


def check_dropped(layer: str, projection_bits: Mapping[str, Sequence[int]], top_k: int | None) -> None:
    """Checks that experts are dropped whole, and that a layer keeps enough of them.

    Args:
        layer: Name of the layer, for the message.
        projection_bits: Projection name -> bits, indexed by expert.
        top_k: Number of experts that serve a token; None where it is not known, which asks for one.

    Raises:
        PlanError: An expert has some matrices at 0 bits and others not, or fewer than ``top_k`` experts are left.
    """
    by_expert = list(zip(*projection_bits.values(), strict=True))
    dropped = [expert for expert, widths in enumerate(by_expert) if DROPPED in widths]
    for expert in dropped:
        if any(by_expert[expert]):
            widths = dict(zip(projection_bits, by_expert[expert], strict=True))
            raise PlanError(
                f"layer {layer!r}: expert {expert} has bits {widths}; 0 drops an expert: give 0 to all of them"
            )
    left, needed = len(by_expert) - len(dropped), top_k or 1
    if dropped and left < needed:
        raise PlanError(
            f"layer {layer!r}: {len(dropped)} of {len(by_expert)} experts are dropped and {left} are left, but "
            f"{needed} serve each token: keep at least {needed}"
        )
