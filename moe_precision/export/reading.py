"""Reads the bits of every expert out of a checkpoint that this or another quantizer wrote.

Its config says in which form experts are stored, the shapes of packed tensors say the bits: a config can name experts
that were never quantized.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, opened
from ..checkpoints.headers import CheckpointError, StoredTensor
from ..layers.moe_layers import MoELayer
from ..layers.shape import LayerShape
from ..plans.layer_plan import LayerPlan
from ..plans.notes import PlanNotes
from ..plans.plan import PrecisionPlan
from ..quantize.config import QUANT_METHOD
from . import stored_forms as forms
from .mlx_names import mlx_module
from .names import Place, places
from .stored_forms import Stored
from .torchao_tensors import metadata_of, parts_of, torchao


def plan_of_checkpoint(folder: Checkpoint | str | os.PathLike[str]) -> PrecisionPlan:
    """The widths of a quantized checkpoint as a plan, to look at or to compare with another; no weight is read.

    Args:
        folder: What AutoRound (GPTQ or AWQ packing), GPTQModel, AutoAWQ, llm-compressor (``pack-quantized``, int8),
            mlx-lm (``affine``), transformers with torchao, ModelOpt (NVFP4, FP8), or ``save_pretrained`` of a model
            packed here wrote; or an open `Checkpoint`.

    Returns:
        A plan whose ``method`` is the checkpoint's ``quant_method`` and whose ``notes`` hold ``read_from``, the
        folder's name, and ``group_sizes``, all that occur; its ``group_size`` is the smallest of them.

    Raises:
        CheckpointError: A float checkpoint, another quantizer's, one in a form that is not known, one that lacks an
            expert, or one whose tensors do not fit the model of its config.
        ExportError: Experts whose names on disk are not known.
    """
    with opened(folder) as checkpoint:
        return _plan_of(checkpoint)


def _plan_of(checkpoint: Checkpoint) -> PrecisionPlan:
    name = repr(str(checkpoint.folder))
    quantization = checkpoint.quantization or _of_modelopt(checkpoint.folder)
    if quantization is None:
        packed = next((tensor for tensor in checkpoint.tensors if tensor.endswith(forms.PACKED)), None)
        if packed is not None:
            raise CheckpointError(f"{name} holds {packed!r}, but its config.json does not say how it was quantized")
        raise CheckpointError(f"{name} is a float checkpoint: it has no bits to show")
    method = str(quantization.get("quant_method"))
    if method == QUANT_METHOD:
        plan = PrecisionPlan.from_dict(quantization.get("plan"), f"the config.json of {name}")
        return replace(plan, notes=_read_from(checkpoint, {plan.group_size}))
    form = forms.form_of(quantization, name)
    layers, model_type = checkpoint.layers(), checkpoint.model_type
    named = forms.widths_of(quantization)
    metadata = metadata_of(checkpoint.files) if form == forms.TORCHAO else {}
    found: list[tuple[dict[str, LayerPlan], set[int]]] = []
    problems: list[CheckpointError] = []
    for words in (forms.dense, forms.loose):
        try:
            found.append(_read_layers(layers, _Stores(checkpoint.tensors, model_type, form, named, words, metadata)))
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


def _of_modelopt(folder: Path) -> dict[str, Any] | None:
    """What ModelOpt says in a file of its own, beside a config.json that names no quantizer."""
    path = folder / "hf_quant_config.json"
    if not path.is_file():
        return None
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))["quantization"], "quant_method": "modelopt"}
    except (ValueError, KeyError, TypeError) as error:  # not UTF-8, not JSON, or without that key
        raise CheckpointError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}; copy it again") from error


@dataclass(frozen=True)
class _Stores:
    """What a checkpoint stores: its tensors, their form, the widths that its config names, the words of a row, and what
    its files say of torchao's tensors.
    """

    tensors: dict[str, StoredTensor]
    model_type: str
    form: str
    named: list[int]
    words: Callable[[int, int], int]
    metadata: dict[str, str]


def _read_layers(layers: list[MoELayer], stores: _Stores) -> tuple[dict[str, LayerPlan], set[int]]:
    """The widths of every layer, and all group sizes."""
    groups: set[int] = set()
    found = {}
    for layer in layers:
        widths: dict[str, list[int]] = {}
        for place in places(layer.name, layer.shape, stores.model_type):
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


def _stored(place: Place, expert: int, shape: LayerShape, stores: _Stores) -> Stored:
    """How one expert's matrix is stored, under its name after unfusing or the one on the Hub."""
    out, inp = shape.projections[place.projection]
    if place.projection == "gate_up_proj" and place.part != place.projection:
        out //= 2
    tensors, names = stores.tensors, place.on_disk(expert)
    if stores.form == forms.MLX:
        name = mlx_module(place, stores.model_type)
        if f"{name}.weight" not in tensors:
            raise CheckpointError(f"layer {place.layer!r} has no {name!r} in the checkpoint")
        return forms.mlx(name, tensors, shape.num_experts, out, inp)
    for name in names:
        if parts_of(f"{name}.weight") in tensors:
            described_as = [f"{one}.weight" for one in names]
            return torchao(f"{name}.weight", described_as, stores.metadata, tensors, (out, inp))
        if f"{name}.qweight" in tensors:
            return (forms.awq if stores.form == forms.AWQ else forms.gptq)(name, tensors, out, inp)
        if f"{name}.weight_packed" in tensors:
            return forms.compressed(name, tensors, out, inp, stores.named, stores.words)
        if f"{name}.weight" in tensors and stores.form == forms.MODELOPT:
            return forms.modelopt(name, tensors, out, inp)
        if f"{name}.weight" in tensors:
            return forms.in_bytes(name, tensors, out, inp, stores.named)
    for whole in {place.fused, place.hub} - {""}:
        if parts_of(whole) in tensors:
            shape_of_all = (shape.num_experts, *shape.projections[place.projection])
            return torchao(whole, (place.fused, whole), stores.metadata, tensors, shape_of_all)
    for whole in {place.fused, place.hub} & tensors.keys():
        slices, *matrix = tensors[whole].shape
        expected = sorted(shape.projections[place.projection])
        fits = tensors[whole].is_float and slices >= shape.num_experts and sorted(matrix) == expected
        forms.check(fits, whole, tensors[whole], (shape.num_experts, *shape.projections[place.projection]))
        return Stored(16, None)
    raise CheckpointError(
        f"expert {expert} of layer {place.layer!r} has no {place.part} in the checkpoint: looked for {names} "
        "with .qweight, .weight_packed and .weight"
    )
