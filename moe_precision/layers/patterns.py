"""Experts by the names of their weights, for layouts that structure does not show."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import TypedDict

from .banks import Bank, Experts
from .experts import EXPERT_NAME, banks_of_modules
from .module_tree import MoELayerError, Node, Weight, numbered_children


class Patterns(TypedDict, total=False):
    """Keywords of `find_moe_layers`; each is present only if it was given."""

    router_pattern: str
    expert_pattern: str
    layout: str


_Weights = dict[str, dict[str, dict[int, Weight]]]  # path of a module -> projection -> expert -> weight


def check_pattern(argument: str, pattern: str | None) -> None:
    """Raises `MoELayerError` if a pattern is not a regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise MoELayerError(f"{argument}={pattern!r} is not a regular expression: {error}") from error


def experts_by_pattern(tree: Node, pattern: str) -> list[Experts]:
    """Finds experts by the names of their weights, for layouts that structure does not show.

    Args:
        tree: The model's tree.
        pattern: Regular expression that is searched in clean weight names. Where each expert has weights of its own, a
            group ``(?P<expert>\\d+)`` must match the expert's index; else each weight is a bank of all experts, 3-D
            ``(E, ...)`` or flat ``(E * rows, columns)``. A group ``(?P<transposed>...)`` marks the weights that hold
            ``(in, out)`` matrices, where the rules of `orientation` cannot decide; one that never matches,
            ``(?P<transposed>(?!))?``, says that none does.

    Raises:
        MoELayerError: Nothing matches, indices have gaps, or matrices of one name differ in shape.
    """
    separate: _Weights = defaultdict(lambda: defaultdict(dict))
    banks: dict[str, dict[str, Weight]] = defaultdict(dict)
    turned: set[Weight] = set()
    compiled = re.compile(pattern)
    for name, weight in tree.named_weights():
        match = compiled.search(name)
        if match is None or len(weight.shape) < 2:
            continue
        if match.groupdict().get("transposed") is not None:
            turned.add(weight)
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
    try:
        found = [_separate(tree.get(path), weights, turned) for path, weights in separate.items()]
        found += [_banks(tree.get(path), weights, turned) for path, weights in banks.items()]
    except MoELayerError as error:
        raise MoELayerError(f"expert_pattern={pattern!r}: {error}") from None
    if not found:
        raise MoELayerError(f"expert_pattern={pattern!r} matches no matrix; the model has, for example, {_some(tree)}")
    return [replace(experts, oriented="transposed" in compiled.groupindex) for experts in found]


def _separate(node: Node, by_projection: dict[str, dict[int, Weight]], turned: set[Weight]) -> Experts:
    """Experts that each have weights of their own, all in one module."""
    counts = {projection: sorted(weights) for projection, weights in by_projection.items()}
    count = len(next(iter(counts.values())))
    if any(indices != list(range(count)) for indices in counts.values()) or count < 2:
        raise MoELayerError(f"expected experts 0, 1, ... at {node.path!r}, got {counts}")
    banks = {}
    for projection, weights in by_projection.items():
        shapes = {weight.shape for weight in weights.values()}
        if len(shapes) > 1:
            raise MoELayerError(f"experts at {node.path!r} differ in shape: {projection!r} has {shapes}")
        ordered = [weights[expert] for expert in range(count)]
        banks[projection] = Bank(ordered, count, transposed=ordered[0] in turned)
    modules = _as_modules(node, banks)
    return Experts(node, count, modules or banks, "modules" if modules else "separate", named=True)


def _as_modules(node: Node, banks: dict[str, Bank]) -> dict[str, Bank]:
    """The same matrices by their paths inside a module for each expert; empty if there are no such modules.

    All matrices of these modules must be among them, as ``(out, in)``.
    """
    children = numbered_children(node)
    if any(len(bank.weights) != len(children) or bank.transposed for bank in banks.values()):
        return {}
    found = banks_of_modules(children)
    known = {id(weight.parameter()) for bank in banks.values() for weight in bank.weights}
    theirs = {id(weight.parameter()) for bank in found.values() for weight in bank.weights}
    return found if theirs == known else {}


def _banks(node: Node, weights: dict[str, Weight], turned: set[Weight]) -> Experts:
    """Experts as slices of 3-D weights, or as blocks of rows of 2-D ones."""
    three = [weight for weight in weights.values() if len(weight.shape) == 3]
    if three and len(three) < len(weights):
        raise MoELayerError(f"matches 2-D and 3-D weights at {node.path!r}: {list(weights)}")
    count = min((weight.shape[0] for weight in three), default=0)
    banks = {name: Bank([weight], count, transposed=weight in turned) for name, weight in weights.items()}
    return Experts(node, count, banks, "fused" if three else "flat", named=True)


def _merged_siblings(separate: _Weights) -> _Weights:
    """Joins ``mlp.experts.linear_fc1`` and ``mlp.experts.linear_fc2`` (Megatron) into one layer."""
    parents: dict[str, list[str]] = defaultdict(list)
    for path in separate:
        parents[path.rpartition(".")[0]].append(path)
    merged: _Weights = {}
    for parent, paths in parents.items():
        join = len(paths) > 1 and EXPERT_NAME.search(parent.rpartition(".")[2])
        for path in paths:
            prefix = path.rpartition(".")[2] + "." if join else ""
            target = merged.setdefault(parent if join else path, {})
            target |= {(prefix + name).removesuffix(".weight"): weights for name, weights in separate[path].items()}
    return merged


def _some(tree: Node, count: int = 5) -> str:
    return ", ".join([name for name, weight in tree.named_weights() if len(weight.shape) >= 2][:count])
