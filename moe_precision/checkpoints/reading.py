"""Norms, variances and costs straight from a checkpoint's safetensors files; no weight of a model is allocated.

The model's class is laid out on the meta device for its names and shapes alone. transformers' own mapping says which
tensors on disk, under their hub names, make up a router or a bank of experts. Only these are read, one after the other.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

from ..allocation.costs import Costs, costs_of_matrices
from ..errors import MoEPrecisionError
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..plans.plan import model_type_of
from ..recording.curvature import Curvature
from ..recording.router_norms import RouterNormHistory
from ..recording.signals import max_variance
from .checkpoint import CheckpointError, empty_model, weight_files


class StreamingError(MoEPrecisionError, NotImplementedError):
    """A checkpoint whose tensors are converted in a way that cannot be followed one tensor at a time."""


@dataclass(frozen=True)
class Source:
    """One tensor on disk that goes into a parameter, and what transformers does with it on the way."""

    name: str
    pattern: str | None
    converter: WeightConverter | None

    def results(self, parameter: str) -> list[str]:
        """Everything that the conversion makes of it, of which ``parameter`` is the first."""
        if self.converter is None:
            return [parameter]
        first, *others = self.converter.target_patterns
        return [parameter, *(parameter.replace(first, other) for other in others)]


@dataclass(frozen=True)
class _Checkpoint:
    """An opened checkpoint: its layers, and where the tensors on disk are that make up each parameter."""

    folder: str
    model: Any
    layers: list[MoELayer]
    sources: dict[str, list[Source]]
    place: dict[str, Any]


@contextmanager
def _opened(folder: str | os.PathLike, patterns: dict[str, Any] | None) -> Iterator[_Checkpoint]:
    files = weight_files(folder)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{os.fspath(folder)!r} is quantized; give the float checkpoint")
    model = empty_model(folder, config)
    layers = find_moe_layers(model, **(patterns or {}))
    with ExitStack() as stack:
        # Read and not mapped, so that memory is free again as soon as a tensor is done with.
        opened = [stack.enter_context(safe_open(file, "pt", backend="pread")) for file in files]
        place = {name: shard for shard in opened for name in shard.keys()}  # noqa: SIM118
        sources = _with_aliases(model, sources_of(model, list(place)))
        yield _Checkpoint(os.fspath(folder), model, layers, sources, place)


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
    with _opened(folder, patterns) as checkpoint:
        history = RouterNormHistory.of(checkpoint.layers, model_type_of(checkpoint.model), patterns)
        history.record(0, torch.cat([_router_norms(layer, checkpoint) for layer in checkpoint.layers]))
        if broken := history.not_finite():
            where = broken.removesuffix(" at step 0")
            raise CheckpointError(f"{os.fspath(folder)!r}: {where}; the weights are damaged")
        if variance:
            experts = sum(layer.num_experts for layer in checkpoint.layers)
            with tqdm(total=experts, desc="variance", unit="expert", disable=None if experts >= 64 else True) as bar:
                for layer in checkpoint.layers:
                    matrices = _matrices(layer, layer.first, checkpoint, neurons_alone=True)
                    history.max_variance[layer.name] = torch.stack([max_variance(matrix) for matrix in matrices])
                    bar.update(layer.num_experts)
    return history


def costs_of_checkpoint(
    folder: str | os.PathLike,
    widths: Sequence[int],
    group_size: int,
    curvature: Curvature | None = None,
    patterns: dict[str, Any] | None = None,
) -> Costs:
    """`expert_costs` of a checkpoint, with one expert matrix in memory at a time.

    Args:
        folder: As in `signals_of_checkpoint`.
        widths: Candidate widths.
        group_size: Weights that share a scale and an offset.
        curvature: Weighs fit and errors; None for squared weight errors.
        patterns: ``router_pattern`` and ``expert_pattern`` for `find_moe_layers`.

    Raises:
        CheckpointError: A file or tensor is missing or damaged.
        StreamingError: As in `signals_of_checkpoint`.
        CostError: A matrix cannot be quantized.
    """
    with _opened(folder, patterns) as checkpoint:

        def read(layer: MoELayer, projection: str) -> Iterator[Tensor]:
            return _matrices(layer, projection, checkpoint)

        return costs_of_matrices(checkpoint.layers, read, widths, group_size, curvature)


def sources_of(model: Any, names: list[str]) -> dict[str, list[Source]]:
    """Parameter of the model -> the tensors on disk that make it up, in transformers' order.

    Tensors that are no parameter of the model stand under the name that they would have.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[Source]] = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = name, None
        found[renamed].append(Source(name, pattern, by_pattern[pattern] if pattern is not None else None))
    return found


def _with_aliases(model: Any, found: dict[str, list[Source]]) -> dict[str, list[Source]]:
    """The same with parameters that two modules share under all of their names."""
    aliases: dict[int, list[str]] = defaultdict(list)  # stored under one of their names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    for shared in aliases.values():
        stored = [name for name in shared if name in found]
        found |= {name: found[stored[0]] for name in shared if stored and name not in found}
    return found


def _one(parameter: str, sources: dict[str, list[Source]]) -> str:
    """The tensor on disk that is a parameter, renamed at most."""
    of_this = sources.get(parameter, [])
    if not of_this:
        raise CheckpointError(f"the checkpoint has no tensor for {parameter!r}")
    if len(of_this) > 1 or of_this[0].converter is not None:
        raise StreamingError(f"{parameter!r} is made of {len(of_this)} converted tensors on disk")
    return of_this[0].name


def _router_norms(layer: MoELayer, checkpoint: _Checkpoint) -> Tensor:
    name = _one(layer.router, checkpoint.sources)
    weight = checkpoint.place[name].get_tensor(name)
    if tuple(weight.shape) != layer.router_is.shape:
        raise CheckpointError(
            f"{checkpoint.folder!r}: {name!r} has shape {tuple(weight.shape)}, but its config.json says "
            f"{layer.router_is.shape}"
        )
    rows = weight.T if layer.router_transposed else weight
    return torch.linalg.vector_norm(rows[: layer.num_experts], dim=-1, dtype=torch.float32)


def _matrices(
    layer: MoELayer, projection: str, checkpoint: _Checkpoint, neurons_alone: bool = False
) -> Iterator[Tensor]:
    """One matrix of every expert in order, ``(out, in)``, one in memory at a time.

    Args:
        layer: The layer.
        projection: Which matrix.
        checkpoint: Where it is.
        neurons_alone: Of the first projection the rows of the hidden neurons alone, ``(neurons, in)``.
    """
    whole = torch.empty(layer.banks[projection].shape, device="meta")
    expected = (layer.neurons(whole) if neurons_alone else whole).shape
    for expert, matrix in enumerate(_read(layer, projection, checkpoint, neurons_alone)):
        if matrix.shape != expected:
            raise CheckpointError(
                f"{checkpoint.folder!r}: {projection!r} of expert {expert} in layer {layer.name!r} has shape "
                f"{tuple(matrix.shape)}, but its config.json says {tuple(expected)}"
            )
        yield matrix


def _read(layer: MoELayer, projection: str, checkpoint: _Checkpoint, neurons_alone: bool) -> Iterator[Tensor]:
    bank, sources, place = layer.banks[projection], checkpoint.sources, checkpoint.place
    parameter = bank.weights[0].name
    converted = [source for source in sources.get(parameter, []) if source.converter is not None]
    if len(bank.weights) == 1 and converted:  # joined on disk in no way: gate and up are tensors of their own
        for names in _stacked(parameter, converted, layer, projection):
            parts = [place[name].get_tensor(name) for name in (names[:1] if neurons_alone else names)]
            yield parts[0] if len(parts) == 1 else torch.cat(parts)
        return
    stored = [_one(weight.name, sources) for weight in bank.weights]
    if len(stored) > 1:  # a tensor an expert
        matrices: Iterator[Tensor] = (place[name].get_tensor(name) for name in stored)
    else:
        (name,) = stored
        rows = bank.weights[0].shape[0] // layer.num_experts if len(bank.weights[0].shape) == 2 else 1
        ranges = (slice(expert * rows, (expert + 1) * rows) for expert in range(layer.num_experts))
        parts_of = (place[name].get_slice(name)[part] for part in ranges)
        one_each = (part.squeeze(0) if part.ndim == 3 else part for part in parts_of)
        matrices = (matrix.T if bank.transposed else matrix for matrix in one_each)
    for matrix in matrices:
        yield layer.neurons(matrix) if neurons_alone else matrix


def _stacked(parameter: str, sources: list[Source], layer: MoELayer, projection: str) -> list[tuple[str, ...]]:
    """For each expert the names of the tensors on disk that are joined into its matrix on loading, gate before up."""
    converter = sources[0].converter
    assert converter is not None
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(converter.target_patterns) > 1:
        raise StreamingError(f"{parameter!r} is converted by {[kind.__name__ for kind in kinds]} on loading")
    columns = [
        [source.name for source in sources if source.pattern == pattern] for pattern in converter.source_patterns
    ]
    slices = layer.banks[projection].weights[0].shape[0]
    for column in columns:
        if len(column) != slices:
            raise CheckpointError(f"the checkpoint has {len(column)} of {slices} experts for {parameter!r}")
    return list(zip(*columns, strict=True))[: layer.num_experts]  # the others are null experts
