"""The other way: the bits of every expert, read out of a checkpoint that this or another quantizer wrote.

Shapes of packed tensors decide, not what a config says: a config can name experts that were never quantized.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..checkpoints import CheckpointError, StoredTensor, empty_model, stored_tensors
from ..moe_layers import LayerShape, find_moe_layers
from ..plan import LayerPlan, PrecisionPlan, model_type_of
from ..quantize.hf import QUANT_METHOD
from .names import Place, places

_GPTQ = ("gptq", "auto-round")
_COMPRESSED_TENSORS = "compressed-tensors"
_FLOAT = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class _Stored:
    """How one matrix is stored: its bits, and how many weights share a scale (None where it is not quantized)."""

    bits: int
    group_size: int | None


def plan_of_checkpoint(folder: str | os.PathLike) -> PrecisionPlan:
    """The widths of a quantized checkpoint as a plan, to look at or to compare with another; no weight is read.

    Args:
        folder: What AutoRound (GPTQ packing), GPTQModel, llm-compressor (``pack-quantized``, int8) or
            ``save_pretrained`` of a model packed here wrote.

    Returns:
        A plan whose ``method`` is the checkpoint's ``quant_method`` and whose ``settings`` hold ``read_from``, the
        folder's name, and ``group_sizes``, all that occur; its ``group_size`` is the smallest of them.

    Raises:
        CheckpointError: A float checkpoint, another quantizer's, one that lacks an expert, or one whose tensors do not
            fit the model of its config.
        ExportError: Experts whose names on disk are not known.
    """
    tensors = stored_tensors(folder)
    written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    quantization = written.get("quantization_config") or written.get("text_config", {}).get("quantization_config")
    if quantization is None:
        raise CheckpointError(f"{os.fspath(folder)!r} is a float checkpoint: it has no bits to show")
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        plan = PrecisionPlan.from_dict(quantization["plan"], os.fspath(folder))
        return replace(plan, settings=plan.settings | _read_from(folder, {plan.group_size}))
    if method not in (*_GPTQ, _COMPRESSED_TENSORS):
        raise CheckpointError(
            f"{os.fspath(folder)!r} was quantized by {method!r}; read are {', '.join((*_GPTQ, _COMPRESSED_TENSORS))} "
            f"and {QUANT_METHOD}"
        )
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(folder, config)
    model_type = model_type_of(model)
    groups: set[int] = set()
    layers = {}
    for layer in find_moe_layers(model):
        widths: dict[str, list[int]] = {}
        for place in places(layer.name, layer.shape, model_type):
            stored = [_stored(place, e, layer.shape, tensors, quantization) for e in range(layer.num_experts)]
            bits = [one.bits for one in stored]
            if widths.setdefault(place.projection, bits) != bits:
                raise CheckpointError(
                    f"layer {layer.name!r}: gate_proj and up_proj of an expert have different bits in "
                    f"{os.fspath(folder)!r}, and a plan has one width for both"
                )
            groups |= {one.group_size for one in stored if one.group_size is not None}
        layers[layer.name] = LayerPlan(layer.shape, widths)
    settings = _read_from(folder, groups)
    plan = PrecisionPlan(model_type, layers, min(groups, default=128), 0.0, str(method), settings)
    return replace(plan, asked_average_bits=plan.average_bits)


def _read_from(folder: str | os.PathLike, groups: Iterable[int]) -> dict[str, Any]:
    return {"read_from": Path(folder).name, "group_sizes": sorted(groups)}


def _stored(
    place: Place, expert: int, shape: LayerShape, tensors: dict[str, StoredTensor], quantization: dict[str, Any]
) -> _Stored:
    """How one expert's matrix is stored, under its name after unfusing or the one on the Hub."""
    out, inp = shape.projections[place.projection]
    if place.part != place.projection and place.projection == "gate_up_proj":
        out //= 2
    names = place.on_disk(expert)
    for name in names:
        if (packed := tensors.get(f"{name}.qweight")) is not None:
            return _gptq(name, packed, tensors, out, inp)
        if (packed := tensors.get(f"{name}.weight_packed")) is not None:
            return _compressed(name, packed, tensors, out, inp, quantization)
        if (weight := tensors.get(f"{name}.weight")) is not None:
            if weight.dtype == "I8" and weight.shape == (out, inp):
                return _Stored(8, _group_size(name, f"{name}.weight_scale", 1, tensors, inp))
            _check(weight.dtype in _FLOAT and weight.shape == (out, inp), name, weight, (out, inp))
            return _Stored(16, None)
    for whole in (place.fused, place.hub):
        if whole in tensors:
            _check(tensors[whole].dtype in _FLOAT, whole, tensors[whole], (shape.num_experts, "..."))
            return _Stored(16, None)
    raise CheckpointError(
        f"expert {expert} of layer {place.layer!r} has no {place.part} in the checkpoint: looked for {names} "
        "with .qweight, .weight_packed and .weight"
    )


def _gptq(name: str, packed: StoredTensor, tensors: dict[str, StoredTensor], out: int, inp: int) -> _Stored:
    """``qweight`` is ``(in * bits / 32, out)`` int32, ``scales`` are ``(in / group, out)``."""
    rows, columns = packed.shape if len(packed.shape) == 2 else (0, 0)
    bits, rest = divmod(32 * rows, inp)
    fits = packed.dtype == "I32" and columns == out and rest == 0 and 1 <= bits <= 8
    _check(fits, f"{name}.qweight", packed, ("in * bits / 32", out))
    return _Stored(bits, _group_size(name, f"{name}.scales", 0, tensors, inp))


def _compressed(
    name: str,
    packed: StoredTensor,
    tensors: dict[str, StoredTensor],
    out: int,
    inp: int,
    quantization: dict[str, Any],
) -> _Stored:
    """``weight_packed`` is ``(out, words)`` int32; older releases leave the end of a word empty, newer ones do not.

    The config's groups say which widths are meant, the number of words which of them this is.
    """
    rows, words = packed.shape if len(packed.shape) == 2 else (0, 0)
    weights = [group.get("weights") or {} for group in quantization.get("config_groups", {}).values()]
    named = sorted({of_group["num_bits"] for of_group in weights if of_group.get("type") == "int"})
    dense = [bits for bits in named if words == math.ceil(inp * bits / 32)]
    fitting = dense or [bits for bits in named if words == math.ceil(inp / (32 // bits))]
    fits = packed.dtype == "I32" and rows == out and len(fitting) == 1
    _check(fits, f"{name}.weight_packed", packed, (out, f"words for one of {named} bits"))
    return _Stored(fitting[0], _group_size(name, f"{name}.weight_scale", 1, tensors, inp))


def _group_size(name: str, scale: str, dimension: int, tensors: dict[str, StoredTensor], inp: int) -> int:
    groups = tensors[scale].shape[dimension] if scale in tensors and len(tensors[scale].shape) == 2 else 0
    if groups < 1 or inp % groups:
        raise CheckpointError(f"{name!r}: {scale!r} is missing or does not divide {inp} input columns into groups")
    return inp // groups


def _check(fits: bool, name: str, tensor: StoredTensor, expected: tuple[object, ...]) -> None:
    if not fits:
        raise CheckpointError(
            f"{name!r} is {tensor.dtype} {tensor.shape}, expected {expected} for the model of config.json; this form "
            "of a quantized weight cannot be read"
        )
