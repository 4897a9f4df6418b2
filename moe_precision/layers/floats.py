"""Whether weights are float matrices, or codes that another quantizer holds, whose values are not the model's.

A norm, a statistic or a fit of codes without their scales is wrong and looks like any other, so whatever is not plainly
float is refused by name before it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..compat import inside, is_fake
from .experts import EXPERT_NAME, is_shared
from .module_tree import FLOATS, Node, Weight

QUANT_METHOD = "moe_precision"  # how config.json names our own quantizer
_CODES = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


def quantizer_of(model: nn.Module) -> str:
    """Name of the quantizer that a transformers model or its config names; empty where there is none."""
    named = getattr(model, "quantization_method", None) if getattr(model, "is_quantized", False) else None
    if named is None:
        entry = getattr(getattr(model, "config", None), "quantization_config", None)
        if not entry:
            return ""
        named = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return str(getattr(named, "value", named) or "unknown")


def not_float(tensor: Tensor) -> str:
    """What a tensor is, if it is not a tensor of floats alone; empty if it is one.

    Wrappers count by what is inside them: those that keep a float tensor of the same shape for a faster product are
    float, and those that keep codes are not, whatever dtype they show.
    """
    kind = f"a {type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.dtype not in FLOATS:
        return kind
    if isinstance(tensor, DTensor):
        return not_float(tensor.to_local())
    if inner := inside(tensor):
        plain = all(not not_float(one) for one in inner) and any(one.shape == tensor.shape for one in inner)
        return "" if plain else kind
    return "" if type(tensor) in (Tensor, nn.Parameter) or is_fake(tensor) else kind


def held_by_others(tree: Node) -> dict[str, str]:
    """Models in a tree that another quantizer holds: path -> a message.

    Args:
        tree: A model's tree; if it is no transformers model, those in it are looked at one by one.
    """
    units = _outermost(tree) or [tree]
    return {unit.path: message for unit in units if (message := _held(unit))}


def _outermost(node: Node) -> list[Node]:
    if isinstance(node.module, PreTrainedModel):
        return [node]
    return [found for child in node.children.values() for found in _outermost(child)]


def _held(unit: Node) -> str:
    kind = type(unit.module).__name__
    advice = "take the float model: the one that was quantized, or this one dequantized"
    if (method := quantizer_of(unit.module)) not in ("", QUANT_METHOD):
        if not getattr(unit.module, "is_quantized", False):
            advice = "if its weights are float, delete config.quantization_config, or what is saved will not load"
        return f"this {kind} is quantized by another quantizer ({method!r}); {advice}"
    for _, weight in unit.named_weights():
        if len(weight.shape) > 1 and (found := _not_float(weight)):
            return f"{weight.name!r} of this {kind} is {found}, which another quantizer holds; {advice}"
    return ""


def _not_float(weight: Weight) -> str:
    """`not_float` of a weight; of its dtype alone where FSDP1 hides it."""
    if weight.unit is None:
        return not_float(weight.parameter())
    return "" if weight.dtype in FLOATS else str(weight.dtype)


def held_as_codes(tree: Node, taken: list[str]) -> list[str]:
    """Experts that are quantized already, in a model whose other experts are float: they must not be skipped.

    Args:
        tree: The model's tree.
        taken: Paths of the experts that were found.
    """
    return [
        f"the experts at {node.path!r} are quantized already ({type(node.module).__name__}); take the float model"
        for node in tree.nodes()
        if EXPERT_NAME.search(node.name)
        and not is_shared(node.path)
        and not any(f"{path}.".startswith(f"{node.path}.") for path in taken)
        and any(buffer.ndim > 1 and buffer.dtype in _CODES for buffer in node.module.buffers())
    ]
