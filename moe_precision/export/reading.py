"""Reads the bits of every expert out of a checkpoint that this or another quantizer wrote.

Shapes of packed tensors decide, not what a config says: a config can name experts that were never quantized.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, opened
from ..checkpoints.headers import CheckpointError, StoredTensor
from ..layers.moe_layers import MoELayer
from ..layers.shape import LayerShape
from ..plans.layer_plan import LayerPlan
from ..plans.notes import PlanNotes
from ..plans.plan import PrecisionPlan
from ..quantize.config import QUANT_METHOD
from .names import Place, places

_GPTQ = ("gptq", "auto-round")
_COMPRESSED_TENSORS = "compressed-tensors"
_FLOAT = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class _Stored:
    """How one matrix is stored: its bits, and how many weights share a scale (None where it is not quantized)."""

    bits: int
    group_size: int | None


def plan_of_checkpoint(folder: Checkpoint | str | os.PathLike[str]) -> PrecisionPlan:
    """The widths of a quantized checkpoint as a plan, to look at or to compare with another; no weight is read.

    Args:
        folder: What AutoRound (GPTQ packing), GPTQModel, llm-compressor (``pack-quantized``, int8) or
            ``save_pretrained`` of a model packed here wrote; or an open `Checkpoint`.

    Returns:
        A plan whose ``method`` is the checkpoint's ``quant_method`` and whose ``notes`` hold ``read_from``, the
        folder's name, and ``group_sizes``, all that occur; its ``group_size`` is the smallest of them.

    Raises:
        CheckpointError: A float checkpoint, another quantizer's, one that lacks an expert, or one whose tensors do not
            fit the model of its config.
        ExportError: Experts whose names on disk are not known.
    """
    with opened(folder) as checkpoint:
        return _plan_of(checkpoint)


def _plan_of(checkpoint: Checkpoint) -> PrecisionPlan:
    name, quantization = repr(str(checkpoint.folder)), checkpoint.quantization
    if quantization is None:
        raise CheckpointError(f"{name} is a float checkpoint: it has no bits to show")
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        plan = PrecisionPlan.from_dict(quantization.get("plan"), f"the config.json of {name}")
        return replace(plan, notes=_read_from(checkpoint, {plan.group_size}))
    if method not in (*_GPTQ, _COMPRESSED_TENSORS):
        raise CheckpointError(
            f"{name} was quantized by {method!r}; supported are {', '.join((*_GPTQ, _COMPRESSED_TENSORS))} and "
            f"{QUANT_METHOD}"
        )
    layers, model_type = checkpoint.layers(), checkpoint.model_type
    named = _widths_of(quantization)
    found: list[tuple[dict[str, LayerPlan], set[int]]] = []
    problems: list[CheckpointError] = []
    for words in (_dense, _loose):
        try:
            found.append(_read_layers(layers, model_type, _Stores(checkpoint.tensors, named, words)))
        except CheckpointError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    if any(one != found[0] for one in found):
        raise CheckpointError(
            f"{name}: its packed words can be read as two different plans of {named} bits, with and without empty "
            "ends, so its bits are not known"
        )
    widths, groups = found[0]
    notes = _read_from(checkpoint, groups)
    return PrecisionPlan(model_type, widths, min(groups, default=128), method, notes=notes)


def _widths_of(quantization: dict[str, Any]) -> list[int]:
    """The integer widths that compressed-tensors' config groups name, ascending."""
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    return sorted({of_group["num_bits"] for of_group in weights if of_group.get("type") == "int"})


def _dense(bits: int, inp: int) -> int:
    """Words per row of ``inp`` codes without a gap."""
    return math.ceil(inp * bits / 32)


def _loose(bits: int, inp: int) -> int:
    """Words per row where no code crosses the end of a word, as compressed-tensors once packed."""
    return math.ceil(inp / (32 // bits))


@dataclass(frozen=True)
class _Stores:
    """What a checkpoint stores: its tensors, the widths that its config names, and how many words a row is."""

    tensors: dict[str, StoredTensor]
    named: list[int]
    words: Callable[[int, int], int]


def _read_layers(layers: list[MoELayer], model_type: str, stores: _Stores) -> tuple[dict[str, LayerPlan], set[int]]:
    """The widths of every layer, and all group sizes."""
    groups: set[int] = set()
    found = {}
    for layer in layers:
        widths: dict[str, list[int]] = {}
        for place in places(layer.name, layer.shape, model_type):
            stored = [_stored(place, expert, layer.shape, stores) for expert in range(layer.num_experts)]
            bits = [one.bits for one in stored]
            if widths.setdefault(place.projection, bits) != bits:
                raise CheckpointError(
                    f"layer {layer.name!r}: gate_proj and up_proj of an expert have different bits, and a plan has one "
                    "width for both"
                )
            groups |= {one.group_size for one in stored if one.group_size is not None}
        found[layer.name] = LayerPlan(layer.shape, widths)
    return found, groups


def _read_from(checkpoint: Checkpoint, groups: Iterable[int]) -> PlanNotes:
    return {"read_from": checkpoint.folder.name, "group_sizes": sorted(groups)}


def _stored(place: Place, expert: int, shape: LayerShape, stores: _Stores) -> _Stored:
    """How one expert's matrix is stored, under its name after unfusing or the one on the Hub."""
    out, inp = shape.projections[place.projection]
    if place.projection == "gate_up_proj" and place.part != place.projection:
        out //= 2
    tensors, names = stores.tensors, place.on_disk(expert)
    for name in names:
        if (packed := tensors.get(f"{name}.qweight")) is not None:
            return _gptq(name, packed, tensors, out, inp)
        if (packed := tensors.get(f"{name}.weight_packed")) is not None:
            return _compressed(name, packed, stores, out, inp)
        if (weight := tensors.get(f"{name}.weight")) is not None:
            if weight.dtype == "I8" and weight.shape == (out, inp) and stores.named == [8]:  # bytes show no width
                return _Stored(8, _group_size(name, f"{name}.weight_scale", 1, tensors, inp))
            _check(weight.dtype in _FLOAT and weight.shape == (out, inp), name, weight, (out, inp))
            return _Stored(16, None)
    for whole in {place.fused, place.hub} & tensors.keys():
        slices, *matrix = tensors[whole].shape
        expected = sorted(shape.projections[place.projection])
        fits = tensors[whole].dtype in _FLOAT and slices >= shape.num_experts and sorted(matrix) == expected
        _check(fits, whole, tensors[whole], (shape.num_experts, *shape.projections[place.projection]))
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


def _compressed(name: str, packed: StoredTensor, stores: _Stores, out: int, inp: int) -> _Stored:
    """``weight_packed`` is ``(out, words)`` int32; the config's groups say which widths are meant.

    With empty ends 7 and 8 bits fill the same number of words: the smaller is taken, which differs from `_dense`'s.
    """
    rows, words = packed.shape if len(packed.shape) == 2 else (0, 0)
    fitting = [bits for bits in stores.named if words == stores.words(bits, inp)]
    fits = packed.dtype == "I32" and rows == out and len(fitting) > 0
    _check(fits, f"{name}.weight_packed", packed, (out, f"words for one of {stores.named} bits"))
    return _Stored(fitting[0], _group_size(name, f"{name}.weight_scale", 1, stores.tensors, inp))


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
