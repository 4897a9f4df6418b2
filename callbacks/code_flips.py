"""The share of the codes that a step changes, in a sample of every matrix."""

from __future__ import annotations

from torch import Tensor

from moe_precision.annealing.hooks import GridHooks


class CodeFlips:
    """Counts between two looks at the codes; both are collectives under FSDP2."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []

    def look(self, hooks: GridHooks) -> None:
        """Before a step that is logged; a second look before it changes nothing."""
        if not self._before:
            self._before = hooks.codes()

    def share(self, hooks: GridHooks) -> float | None:
        """After the step: the share of codes that differ; None if nothing was looked at."""
        if not self._before:
            return None
        pairs = list(zip(self._before, hooks.codes(), strict=True))
        self._before = []
        flipped = sum((a != b).sum().to(pairs[0][0].device) for a, b in pairs)  # one wait for the device
        return int(flipped) / max(1, sum(a.numel() for a, _ in pairs))
