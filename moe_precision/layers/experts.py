"""The rules that find experts in a module tree by structure: banks of all experts, or lists of equal modules."""

from __future__ import annotations

import re

from torch import nn

from ..compat import is_convolution
from .banks import Bank, Experts
from .module_tree import Node, numbered_children

EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_COUNT_NAME = re.compile(r"(?:^|_)num_(?:local_)?experts$", re.IGNORECASE)


def find_experts(tree: Node) -> list[Experts]:
    """Finds all that may be experts, outer ones first."""
    found: list[Experts] = []
    for node in tree.nodes():
        if is_shared(node.path):
            continue
        named = _named_like_experts(node)
        banks = _fused_banks(node) or _flat_banks(node)
        if banks:
            first = next(iter(banks.values()))
            layout = "fused" if len(first.weights[0].shape) == 3 else "flat"
            found.append(Experts(node, first.num_experts, banks, layout, named))
            continue
        children = numbered_children(node)
        if len(children) >= 2 and _are_experts(children):
            found.append(Experts(node, len(children), banks_of_modules(children), "modules", named))
    return found


def not_understood(tree: Node, taken: list[Experts]) -> list[str]:
    """Modules called ``experts`` with weights in a layout that no rule here covers: they must not be skipped."""
    found = [experts.path for experts in taken]
    known = {id(w.parameter()) for experts in taken for bank in experts.banks.values() for w in bank.weights}
    return [
        f"the weights of {node.path!r} ({type(node.module).__name__}) are in a layout that is not understood; name "
        "them with expert_pattern"
        for node in tree.nodes()
        if node.name == "experts"
        and not is_shared(node.path)
        and not any(f"{layer}.".startswith(f"{node.path}.") or node.path.startswith(f"{layer}.") for layer in found)
        and any(len(weight.shape) >= 2 and id(weight.parameter()) not in known for _, weight in node.named_weights())
    ]


def is_shared(path: str) -> bool:
    """Shared experts see every token: no router chooses them, and they are left alone."""
    return any("shared" in part for part in path.split(".")[-2:])


def _named_like_experts(node: Node) -> bool:
    own = f"{node.name} {type(node.module).__name__}"
    return bool(EXPERT_NAME.search(own)) or any(name.lower().startswith("expert") for name in node.children)


def _fused_banks(node: Node) -> dict[str, Bank]:
    """Own 3-D float weights of a module that share their first dimension, or those of its one-weight children."""
    if is_convolution(node.module):
        return {}
    own = {
        name: w
        for name, w in node.weights.items()
        if len(w.shape) == 3 and w.is_floating_point and "shared" not in name
    }
    if not own:
        for child_name, child in node.children.items():
            weights = list(child.weights.items())
            if len(weights) == 1 and len(weights[0][1].shape) == 3 and not is_convolution(child.module):
                own[f"{child_name}.{weights[0][0]}"] = weights[0][1]
    sizes = {w.shape[0] for w in own.values()}
    # longcat: gate_up has slices of null experts too, down does not; more uneven banks are something else
    uneven = len(sizes) == len(own) == 2 and bool(EXPERT_NAME.search(type(node.module).__name__))
    alike = len(sizes) == 1 or uneven
    if len(own) < 2 or not alike or min(sizes) < 2:
        return {}
    return {name: Bank([w], min(sizes)) for name, w in own.items()}


def _flat_banks(node: Node) -> dict[str, Bank]:
    """Own 2-D weights of one shape that hold all experts one below the other, where the module gives their number."""
    own = {name: w for name, w in node.weights.items() if len(w.shape) == 2 and w.is_floating_point}
    counts = {value for name, value in vars(node.module).items() if type(value) is int and _COUNT_NAME.search(name)}
    if len(own) < 2 or len({w.shape for w in own.values()}) > 1 or len(counts) != 1:
        return {}
    (count,) = counts
    if count < 2 or next(iter(own.values())).shape[0] % count:
        return {}
    return {name: Bank([weight], count) for name, weight in own.items()}


def _are_experts(children: list[Node]) -> bool:
    """Equal modules of matrices and vectors only, with at least one matrix, and no attention, embedding or experts."""

    def signature(node: Node) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, weight.shape) for name, weight in node.named_weights()]

    first = signature(children[0])
    if not any(len(shape) == 2 for _, shape in first) or any(len(shape) > 2 for _, shape in first):
        return False
    for node in children[0].nodes():
        relative = node.path.removeprefix(children[0].path).lstrip(".")
        if re.search(r"attn|attention", relative, re.IGNORECASE) or isinstance(node.module, nn.Embedding):
            return False
        if relative and len(numbered_children(node)) >= 2 and _named_like_experts(node):
            return False  # a stack of layers with experts of their own
    kind = type(children[0].module)
    return all(type(child.module) is kind and signature(child) == first for child in children[1:])


def banks_of_modules(children: list[Node]) -> dict[str, Bank]:
    """The matrices of equal modules, one for each expert, by their paths inside one of them."""
    weights = [dict(child.named_weights()) for child in children]
    return {
        name.removesuffix(".weight"): Bank([of_one[name] for of_one in weights], len(children))
        for name, weight in weights[0].items()
        if len(weight.shape) == 2
    }
