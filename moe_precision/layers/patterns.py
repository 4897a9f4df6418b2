"""Experts by the names of their weights, for layouts that structure cannot tell."""

from __future__ import annotations

import re
from collections import defaultdict

from .banks import Bank, Experts
from .experts import EXPERT_NAME
from .module_tree import MoELayerError, Node, Weight


def check_pattern(argument: str, pattern: str | None) -> None:
    """Raises `MoELayerError` if a pattern is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise MoELayerError(f"{argument}={pattern!r} is no regular expression: {error}") from error


def experts_by_pattern(tree: Node, pattern: str) -> list[Experts]:
    """Finds experts by the names of their weights, for layouts that structure cannot tell.

    Args:
        tree: The model's tree.
        pattern: Regular expression that is searched in clean weight names. Where each expert has weights of its own, a
            group ``(?P<expert>\\d+)`` must match the expert's index; else each weight is a bank of all experts, 3-D
            ``(E, ...)`` or flat ``(E * rows, columns)``. The last of several flat banks maps back to the layer's
            width, and is stored ``(in, out)`` as in MegaBlocks.

    Raises:
        MoELayerError: Nothing matches, indices have gaps, or matrices of one name differ in shape.
    """
    separate: dict[str, dict[str, dict[int, Weight]]] = defaultdict(lambda: defaultdict(dict))
    banks: dict[str, dict[str, Weight]] = defaultdict(dict)
    compiled = re.compile(pattern)
    for name, weight in tree.named_weights():
        match = compiled.search(name)
        if match is None or len(weight.shape) < 2:
            continue
        if match.groupdict().get("expert") is None:
            path, _, own = name.rpartition(".")
            if own == "weight":
                path, _, own = path.rpartition(".")
            banks[path][own] = weight
        else:
            start, end = match.span("expert")
            path, _, begun = name[:start].rpartition(".")
            projection = (begun + name[end:]).strip("._").removesuffix(".weight")
            separate[path][projection or "weight"][int(match["expert"])] = weight
    if "expert" in compiled.groupindex:
        separate = _merged_siblings(separate)
    found = []
    for path, by_projection in separate.items():
        counts = {projection: sorted(weights) for projection, weights in by_projection.items()}
        count = len(next(iter(counts.values())))
        shapes = {projection: {w.shape for w in weights.values()} for projection, weights in by_projection.items()}
        if any(indices != list(range(count)) for indices in counts.values()) or count < 2:
            raise MoELayerError(f"expert_pattern={pattern!r}: expected experts 0, 1, ... at {path!r}, got {counts}")
        if any(len(of_one) > 1 for of_one in shapes.values()):
            raise MoELayerError(f"expert_pattern={pattern!r}: experts at {path!r} differ in shape: {shapes}")
        ordered = {p: Bank([weights[e] for e in range(count)], count) for p, weights in by_projection.items()}
        found.append(Experts(tree.get(path), count, ordered, "separate", True))
    for path, weights in banks.items():
        three = {name: w for name, w in weights.items() if len(w.shape) == 3}
        if three and len(three) < len(weights):
            raise MoELayerError(f"expert_pattern={pattern!r} matches 2-D and 3-D weights at {path!r}: {list(weights)}")
        count = min(w.shape[0] for w in three.values()) if three else 0
        by_name = {name: Bank([weight], count) for name, weight in weights.items()}
        found.append(Experts(tree.get(path), count, by_name, "fused" if three else "flat", True))
    if not found:
        raise MoELayerError(f"expert_pattern={pattern!r} matches no matrix; the model has, for example, {_some(tree)}")
    return found


def _merged_siblings(
    separate: dict[str, dict[str, dict[int, Weight]]],
) -> dict[str, dict[str, dict[int, Weight]]]:
    """Joins ``mlp.experts.linear_fc1`` and ``mlp.experts.linear_fc2`` (Megatron): one layer, two matrices an expert."""
    parents: dict[str, list[str]] = defaultdict(list)
    for path in separate:
        parents[path.rpartition(".")[0]].append(path)
    merged: dict[str, dict[str, dict[int, Weight]]] = {}
    for parent, paths in parents.items():
        join = len(paths) > 1 and EXPERT_NAME.search(parent.rpartition(".")[2])
        for path in paths:
            prefix = path.rpartition(".")[2] + "." if join else ""
            target = merged.setdefault(parent if join else path, {})
            target |= {(prefix + name).removesuffix(".weight"): weights for name, weights in separate[path].items()}
    return merged


def _some(tree: Node, count: int = 5) -> str:
    return ", ".join([name for name, weight in tree.named_weights() if len(weight.shape) >= 2][:count])
