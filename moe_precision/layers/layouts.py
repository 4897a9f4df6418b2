"""Layouts of other training frameworks by name: where their routers and experts are, and how their banks are stored.

A few lines for each. What structure shows without a name (transformers' families, torchtitan, Megatron's experts as
modules, DeepSpeed's) needs none of these; a name says more than shapes can where a matrix is square.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .banks import Experts
from .module_tree import MoELayerError, Node
from .patterns import experts_by_pattern


@dataclass(frozen=True)
class Layout:
    """How a framework lays out a Mixture-of-Experts layer.

    Attributes:
        router: Regular expression searched in clean weight names, as ``router_pattern``.
        experts: The same for the experts' weights, as ``expert_pattern``.
        in_out: Part of the class name of the module that owns the banks -> regular expression of the projections that
            it stores as ``(in, out)``; the first part that occurs counts, and "" is in every name.
    """

    router: str
    experts: str
    in_out: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def stored_in_out(self, owner: str, projection: str) -> bool:
        """Whether a module of class ``owner`` holds ``(in, out)`` matrices under this name."""
        pattern = next((pattern for part, pattern in self.in_out.items() if part in owner), None)
        return pattern is not None and re.fullmatch(pattern, projection) is not None


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        # megatron-core: TEGroupedMLP, one numbered weight per expert or one 3-D; SequentialMLP, one module per expert
        "megatron": Layout(
            r"mlp\.router\.weight$",
            r"mlp\.experts\.(?:local_experts\.)?(?:linear_fc[12]\.weight)?(?P<expert>\d+)?(?:\.linear_fc[12]\.weight)?$",
        ),
        # MegaBlocks: SparseMLP, SparseGLU and their Grouped forms, flat; MLP, 3-D
        "megablocks": Layout(
            r"router\.layer\.weight$",
            r"experts\.mlp\.(?:w1|w2|v1)$",
            MappingProxyType({"Sparse": "w2", "Grouped": "w2", "": "w1|w2|v1"}),
        ),
        # OLMo-core: MoEMLP and DroplessMoEMLP, flat; RoutedExperts of its second version, 3-D; the router is 1-D
        "olmo-core": Layout(
            r"(?<!shared_experts_)router\.weight$",
            r"(?:experts\.mlp\.w[123]|routed_experts\.w_(?:up_gate|down))$",
            MappingProxyType({"Dropless": "w2", "RoutedExperts": "w_down", "": "w[123]"}),
        ),
        # torchtitan: GroupedExperts, 3-D, all (out, in); before 0.3 in ``experts``, without the suffixes of shapes
        "torchtitan": Layout(
            r"router\.gate\.weight$", r"(?:routed_experts\.inner_experts|moe\.experts)\.w[123](?:_E[DF]{2})?$"
        ),
    }
)


def check_layout(layout: str | None, *patterns: str | None) -> None:
    """Checks the name of a layout.

    Raises:
        MoELayerError: There is none of this name, or patterns are given beside it.
    """
    if layout is None:
        return
    if layout not in LAYOUTS:
        raise MoELayerError(
            f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}; router_pattern and expert_pattern name "
            "the weights of any other"
        )
    if any(pattern is not None for pattern in patterns):
        raise MoELayerError(f"layout={layout!r} names routers and experts: give no router_pattern or expert_pattern")


def experts_in_layout(tree: Node, layout: str) -> list[Experts]:
    """The experts of a model in a named layout; its flat routers are seen as matrices from now on.

    Args:
        tree: The model's tree; 1-D routers in it get the shape of a matrix.
        layout: A key of `LAYOUTS`.

    Raises:
        MoELayerError: Nothing in the model has such names, or a 1-D router does not tell its shape.
    """
    known = LAYOUTS[layout]
    try:
        found = experts_by_pattern(tree, known.experts)
    except MoELayerError as error:
        raise MoELayerError(f"layout={layout!r} does not fit this model: {error}") from None
    _unflatten_routers(tree, known.router)
    described = []
    for experts in found:
        owner = type(experts.node.module).__name__
        banks = {
            name: replace(bank, transposed=known.stored_in_out(owner, name)) for name, bank in experts.banks.items()
        }
        described.append(replace(experts, banks=banks, oriented=True))
    return described


def fitting_layout(tree: Node) -> str | None:
    """The layout whose names a model has, for a message; None if none or several fit."""
    names = [name for name, _ in tree.named_weights()]
    fitting = [
        layout
        for layout, known in LAYOUTS.items()
        if any(re.search(known.experts, name) for name in names)
        and any(re.search(known.router, name) for name in names)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _unflatten_routers(tree: Node, pattern: str) -> None:
    """Gives 1-D routers their shape ``(E, d)``, by the module's own numbers (OLMo-core stores ``(E * d,)``)."""
    for node in tree.nodes():
        for key, weight in node.weights.items():
            if len(weight.shape) != 1 or not re.search(pattern, weight.name):
                continue
            rows, width = (getattr(node.module, name, None) for name in ("num_experts", "d_model"))
            if type(rows) is not int or type(width) is not int or (rows * width,) != weight.shape:
                raise MoELayerError(
                    f"router {weight.name!r} is 1-D with {math.prod(weight.shape)} values, expected num_experts x "
                    f"d_model of its module ({type(node.module).__name__}), which are {rows} and {width}"
                )
            node.weights[key] = replace(weight, shape=(rows, width), stored=weight.shape)
