"""The rules that find experts in a module tree: banks of all experts, lists of modules, or names that a user gives."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .module_tree import MoELayerError, Node, Weight

_NUMBERED = re.compile(r"^(?:expert_?)?\d+$", re.IGNORECASE)
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_COUNT_NAME = re.compile(r"(?:^|_)num_(?:local_)?experts$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Bank:
    """One matrix of every expert.

    Attributes:
        weights: One 3-D weight ``(E or more, ...)`` or one flat one ``(E * rows, columns)`` for all experts, or one
            matrix an expert.
        num_experts: ``E``.
        transposed: The weights hold ``(in, out)`` matrices.
    """

    weights: list[Weight]
    num_experts: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one expert's matrix."""
        first = self.weights[0].shape
        rows, columns = first[-2:]
        if len(self.weights) == 1 and len(first) == 2:
            rows //= self.num_experts
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self, expert: int) -> Tensor:
        """The matrix of one expert, ``(out, in)``, a detached view where the layout allows it."""
        one = self.weights[expert].read() if len(self.weights) > 1 else self._slices()[expert]
        return one.detach().T if self.transposed else one.detach()

    def matrices(self) -> Iterator[Tensor]:
        """The matrices of all experts in order, as `read` gives them, but reading a bank only once."""
        slices = (weight.read() for weight in self.weights) if len(self.weights) > 1 else self._slices()
        for one in islice(slices, self.num_experts):
            yield one.detach().T if self.transposed else one.detach()

    def _slices(self) -> Tensor:
        bank = self.weights[0].read().detach()
        if isinstance(bank, DTensor):  # one bank at a time, on every rank
            bank = bank.full_tensor()
        return bank if bank.ndim == 3 else bank.unflatten(0, (self.num_experts, -1))


@dataclass(frozen=True, eq=False)
class Experts:
    """All experts of one layer.

    Attributes:
        node: The module that holds them.
        num_experts: ``E``; 0 where a flat bank does not tell, and only the router can.
        banks: Projection name -> its matrices.
        layout: ``fused``: slices of 3-D weights, as transformers' experts interface has them; ``flat``: blocks of rows
            of 2-D weights; ``modules``: a module an expert; ``separate``: weights of an expert in one module.
        named: Called experts, so that it is an error if they have no router.
    """

    node: Node
    num_experts: int
    banks: dict[str, Bank]
    layout: str
    named: bool

    @property
    def path(self) -> str:
        """Clean path of the module that holds them."""
        return self.node.path

    @property
    def template(self) -> str:
        """Path of one expert's module, ``{expert}`` in the place of its index; `path` for fused experts, else empty."""
        if self.layout != "modules":
            return self.path if self.layout == "fused" else ""
        return re.sub(r"\d+$", "{expert}", numbered_children(self.node)[0].path)

    @property
    def identity(self) -> int:
        """The same for experts that two modules share."""
        return id(next(iter(self.banks.values())).weights[0].parameter())

    @property
    def null_experts(self) -> int:
        """Slices of a bank beyond the experts, which the router has rows for; 0 for all but a few families."""
        slices = [bank.weights[0].shape[0] for bank in self.banks.values()] if self.layout == "fused" else []
        return max(slices, default=self.num_experts) - self.num_experts


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
            found.append(Experts(node, len(children), _banks_of_modules(children), "modules", named))
    return found


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
        join = len(paths) > 1 and _EXPERT_NAME.search(parent.rpartition(".")[2])
        for path in paths:
            prefix = path.rpartition(".")[2] + "." if join else ""
            target = merged.setdefault(parent if join else path, {})
            target |= {(prefix + name).removesuffix(".weight"): weights for name, weights in separate[path].items()}
    return merged


def _some(tree: Node, count: int = 5) -> str:
    return ", ".join([name for name, weight in tree.named_weights() if len(weight.shape) >= 2][:count])


def with_count(experts: Experts, num_experts: int) -> Experts:
    """Flat banks once the router has told the number of experts.

    Raises:
        MoELayerError: The rows of a bank are no multiple of it.
    """
    banks = {}
    for index, (name, bank) in enumerate(experts.banks.items()):
        (weight,) = bank.weights
        if weight.shape[0] % num_experts:
            raise MoELayerError(f"{weight.name!r} has {weight.shape[0]} rows, no multiple of {num_experts} experts")
        last = len(experts.banks) > 1 and index == len(experts.banks) - 1
        banks[name] = Bank([weight], num_experts, transposed=last)
    return Experts(experts.node, num_experts, banks, experts.layout, experts.named)


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


def numbered_children(node: Node) -> list[Node]:
    """Children called ``0``, ``expert_0``, ``expert0``, ... in order of number; empty if the numbers have gaps."""
    numbered = {}
    for name, child in node.children.items():
        if _NUMBERED.match(name) and next(child.named_weights(), None) is not None:
            numbered[int(re.sub(r"\D", "", name))] = child
    return [numbered[i] for i in sorted(numbered)] if sorted(numbered) == list(range(len(numbered))) else []


def is_numbered(name: str) -> bool:
    """Whether a child is called like one of many experts."""
    return bool(_NUMBERED.match(name))


def _named_like_experts(node: Node) -> bool:
    own = f"{node.name} {type(node.module).__name__}"
    return bool(_EXPERT_NAME.search(own)) or any(name.lower().startswith("expert") for name in node.children)


def _is_convolution(node: Node) -> bool:
    return isinstance(node.module, nn.modules.conv._ConvNd)


def _fused_banks(node: Node) -> dict[str, Bank]:
    """Own 3-D float weights of a module that share their first dimension, or those of its one-weight children."""
    if _is_convolution(node):
        return {}
    own = {
        name: w
        for name, w in node.weights.items()
        if len(w.shape) == 3 and w.is_floating_point and "shared" not in name
    }
    if not own:
        for child_name, child in node.children.items():
            weights = list(child.weights.items())
            if len(weights) == 1 and len(weights[0][1].shape) == 3 and not _is_convolution(child):
                own[f"{child_name}.{weights[0][0]}"] = weights[0][1]
    sizes = {w.shape[0] for w in own.values()}
    # longcat: gate_up has slices of null experts too, down has not; more uneven banks are something else
    uneven = len(sizes) == len(own) == 2 and bool(_EXPERT_NAME.search(type(node.module).__name__))
    alike = len(sizes) == 1 or uneven
    if len(own) < 2 or not alike or min(sizes) < 2:
        return {}
    return {name: Bank([w], min(sizes)) for name, w in own.items()}


def _flat_banks(node: Node) -> dict[str, Bank]:
    """Own 2-D weights of one shape that hold all experts one below the other, where the module tells their number."""
    own = {name: w for name, w in node.weights.items() if len(w.shape) == 2 and w.is_floating_point}
    counts = {value for name, value in vars(node.module).items() if type(value) is int and _COUNT_NAME.search(name)}
    if len(own) < 2 or len({w.shape for w in own.values()}) > 1 or len(counts) != 1:
        return {}
    (count,) = counts
    if count < 2 or next(iter(own.values())).shape[0] % count:
        return {}
    return with_count(Experts(node, 0, {n: Bank([w], 0) for n, w in own.items()}, "flat", True), count).banks


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


def _banks_of_modules(children: list[Node]) -> dict[str, Bank]:
    weights = [dict(child.named_weights()) for child in children]
    return {
        name.removesuffix(".weight"): Bank([of_one[name] for of_one in weights], len(children))
        for name, weight in weights[0].items()
        if len(weight.shape) == 2
    }
