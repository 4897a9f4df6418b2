"""Where two plans differ, in words."""

from __future__ import annotations

from collections.abc import Mapping

from ..layers.prefixes import prefixes_of
from .layer_plan import LayerPlan


def differences(first: Mapping[str, LayerPlan], second: Mapping[str, LayerPlan]) -> list[str]:
    """One line for each expert matrix whose bits differ, and for each layer that only one plan has, sorted.

    Args:
        first: Layer name -> layer of one plan.
        second: Of the other, perhaps under another prefix.
    """
    lines = []
    change = prefixes_of(*({name: layer.shape for name, layer in plan.items()} for plan in (second, first)))
    others_layers = second if change is None else change.keys(second)
    for name in first.keys() | others_layers.keys():
        mine, theirs = first.get(name), others_layers.get(name)
        if mine is None or theirs is None:
            lines.append(f"{name}: only in the {'other' if mine is None else 'first'} plan")
            continue
        for projection, widths in mine.projection_bits.items():
            others = theirs.projection_bits.get(projection, [])
            if len(others) != len(widths):
                lines.append(f"{name} {projection}: {len(widths)} experts, {len(others)} in the other plan")
                continue
            pairs = enumerate(zip(widths, others, strict=True))
            lines += [f"{name} expert {e} {projection}: {a} -> {b} bits" for e, (a, b) in pairs if a != b]
    return sorted(lines)
