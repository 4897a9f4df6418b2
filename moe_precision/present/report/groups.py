"""The groups of experts that charts color: by their bits."""

from __future__ import annotations

from ...plans.plan import PrecisionPlan

_MOST_GROUPS = 6  # different means of bits that get a color each


class Widths:
    """The groups that experts are colored by: their mean bits, to the nearest whole number where there are many.

    Attributes:
        groups: Mean bits, ascending; None alone without a plan.
    """

    def __init__(self, plan: PrecisionPlan | None) -> None:
        self._of = {} if plan is None else {name: layer.mean_bits for name, layer in plan.layers.items()}
        means = {round(bits, 4) for of in self._of.values() for bits in of}
        self._whole = len(means) > _MOST_GROUPS
        self.groups: list[float | None] = [*sorted({round(bits) if self._whole else bits for bits in means})] or [None]

    def group(self, layer: str, expert: int) -> int:
        """The place of an expert among the groups."""
        if not self._of:
            return 0
        bits = self._of[layer][expert]
        return self.groups.index(round(bits) if self._whole else round(bits, 4))

    def label(self, group: int) -> str:
        """Name of a group."""
        bits = self.groups[group]
        return "experts" if bits is None else f"{'about ' * self._whole}{bits:.3g} bits"

    def of_expert(self, layer: str, expert: int) -> str:
        """Bits of one expert in words, or nothing."""
        return f", {self._of[layer][expert]:.3g} bits" if self._of else ""
