"""Layouts of other training frameworks: where `naming.LAYOUTS` says that their routers and experts are.

What structure shows without a name (transformers' families, torchtitan, Megatron's experts as modules, DeepSpeed's)
needs none of these; a name says more than shapes can where a matrix is square.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from .banks import Experts
from .module_tree import MoELayerError, Node
from .naming import LAYOUTS
from .patterns import experts_by_pattern


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
