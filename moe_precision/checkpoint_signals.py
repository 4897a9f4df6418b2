"""Router norms and variances straight from a checkpoint's safetensors files; no weight of a model is allocated.

The model's class is laid out on the meta device for its names and shapes alone. transformers' own mapping says which
tensors on disk, under their hub names, make up a router or a bank of experts. Only these are read, one after the other.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .checkpoints import CheckpointError, model_class_of, weight_files
from .moe_layers import MoELayer, find_moe_layers
from .plan import model_type_of
from .router_norms import RouterNormHistory
from .signals import max_variance


class StreamingError(NotImplementedError):
    """A checkpoint whose tensors are converted in a way that cannot be followed one tensor at a time."""


@dataclass(frozen=True)
class _Source:
    """One tensor on disk that goes into a parameter, and what transformers does with it on the way."""

    name: str
    pattern: str | None
    converter: WeightConverter | None


def signals_of_checkpoint(
    folder: str | os.PathLike, variance: bool = True, patterns: dict[str, Any] | None = None
) -> RouterNormHistory:
    """A history with one record, at step 0: the router norms of a checkpoint, and its variances.

    Args:
        folder: What ``save_pretrained`` writes: config.json and safetensors, sharded or not, under hub names or not.
        variance: Read the experts' first projections too, for the maximum intra-neuron variance.
        patterns: ``router_pattern`` and ``expert_pattern`` for `find_moe_layers`.

    Raises:
        CheckpointError: A file is missing or truncated, a tensor is missing, or a router holds NaN or infinity.
        StreamingError: transformers converts these tensors by more than renaming, stacking and joining.
        MoELayerError: The model has no Mixture-of-Experts layer.
    """
    files = weight_files(folder)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{os.fspath(folder)!r} is quantized; give the float checkpoint")
    with torch.device("meta"):
        model = model_class_of(folder, config)._from_config(config)
    layers = find_moe_layers(model, **(patterns or {}))
    with ExitStack() as stack:
        # Read and not mapped, so that memory is free again as soon as a tensor is done with.
        opened = [stack.enter_context(safe_open(file, "pt", backend="pread")) for file in files]
        place = {name: shard for shard in opened for name in shard.keys()}  # noqa: SIM118
        sources = _sources(model, list(place))
        history = RouterNormHistory.of(layers, model_type_of(model), patterns)
        norms = [_router_norms(layer, sources, place, folder) for layer in layers]
        history.record(0, torch.cat(norms))
        if broken := history.not_finite():
            where = broken.removesuffix(" at step 0")
            raise CheckpointError(f"{os.fspath(folder)!r}: {where}; the weights are damaged")
        if variance:
            experts = sum(layer.num_experts for layer in layers)
            with tqdm(total=experts, desc="variance", unit="expert", disable=None if experts >= 64 else True) as bar:
                for layer in layers:
                    history.max_variance[layer.name] = _variances(layer, sources, place, folder)
                    bar.update(layer.num_experts)
    return history


def _sources(model: Any, names: list[str]) -> dict[str, list[_Source]]:
    """Parameter of the model -> the tensors on disk that make it up, in transformers' order."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[_Source]] = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = name, None
        found[renamed].append(_Source(name, pattern, by_pattern[pattern] if pattern is not None else None))
    aliases: dict[int, list[str]] = defaultdict(list)  # a parameter that two modules share is stored under one name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    for shared in aliases.values():
        stored = [name for name in shared if name in found]
        found |= {name: found[stored[0]] for name in shared if stored and name not in found}
    return found


def _one(parameter: str, sources: dict[str, list[_Source]]) -> str:
    """The tensor on disk that is a parameter, renamed at most."""
    of_this = sources.get(parameter, [])
    if not of_this:
        raise CheckpointError(f"the checkpoint has no tensor for {parameter!r}")
    if len(of_this) > 1 or of_this[0].converter is not None:
        raise StreamingError(f"{parameter!r} is made of {len(of_this)} converted tensors on disk")
    return of_this[0].name


def _router_norms(layer: MoELayer, sources: Any, place: dict[str, Any], folder: Any) -> Tensor:
    name = _one(layer.router, sources)
    weight = place[name].get_tensor(name)
    if tuple(weight.shape) != layer.router_is.shape:
        raise CheckpointError(
            f"{os.fspath(folder)!r}: {name!r} has shape {tuple(weight.shape)}, but its config.json says "
            f"{layer.router_is.shape}"
        )
    rows = weight.T if layer.router_transposed else weight
    return torch.linalg.vector_norm(rows[: layer.num_experts], dim=-1, dtype=torch.float32)


def _variances(layer: MoELayer, sources: Any, place: dict[str, Any], folder: Any) -> Tensor:
    """``(E,)``, one matrix in memory at a time."""
    expected = layer.neurons(torch.empty(layer.banks[layer.first].shape, device="meta")).shape
    values = []
    for expert, matrix in enumerate(_neurons(layer, sources, place)):
        if matrix.shape != expected:
            raise CheckpointError(
                f"{os.fspath(folder)!r}: {layer.first!r} of expert {expert} in layer {layer.name!r} has shape "
                f"{tuple(matrix.shape)}, but its config.json says {tuple(expected)}"
            )
        values.append(max_variance(matrix))
    return torch.stack(values)


def _neurons(layer: MoELayer, sources: Any, place: dict[str, Any]) -> Iterator[Tensor]:
    """Reads for one expert after the other the rows of its hidden neurons, ``(neurons, in)``."""
    bank = layer.banks[layer.first]
    parameter = bank.weights[0].name
    converted = [source for source in sources.get(parameter, []) if source.converter is not None]
    if len(bank.weights) > 1:  # a module an expert
        for weight in bank.weights:
            name = _one(weight.name, sources)
            yield layer.neurons(place[name].get_tensor(name))
    elif converted:
        for name in _stacked(parameter, converted, layer):
            yield place[name].get_tensor(name)
    else:
        name = _one(parameter, sources)
        rows = bank.weights[0].shape[0] // layer.num_experts if len(bank.weights[0].shape) == 2 else 1
        for expert in range(layer.num_experts):
            part = place[name].get_slice(name)[expert * rows : (expert + 1) * rows]
            matrix = part.squeeze(0) if part.ndim == 3 else part
            yield layer.neurons(matrix.T if bank.transposed else matrix)


def _stacked(parameter: str, sources: list[_Source], layer: MoELayer) -> list[str]:
    """Names of one tensor an expert: the gate, where gate and up are joined into one parameter on loading."""
    converter = sources[0].converter
    assert converter is not None
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(converter.target_patterns) > 1:
        raise StreamingError(f"{parameter!r} is converted by {[kind.__name__ for kind in kinds]} on loading")
    names = [source.name for source in sources if source.pattern == converter.source_patterns[0]]
    slices = layer.banks[layer.first].weights[0].shape[0]
    if len(names) != slices:
        raise CheckpointError(f"the checkpoint has {len(names)} of {slices} experts for {parameter!r}")
    return names[: layer.num_experts]  # the others are null experts
