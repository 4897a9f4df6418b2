"""Routers and expert matrices of a layer straight from a checkpoint's files, one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layers.moe_layers import MoELayer
from .headers import CheckpointError, StoredTensor, check_float
from .sources import Sources, only_source, stacked_sources


class StoredTensors(Protocol):
    """What is needed of a `Checkpoint`."""

    folder: Path
    tensors: dict[str, StoredTensor]

    @property
    def sources(self) -> Sources:
        """Parameter of the model -> the tensors on disk that make it up."""

    def read(self, name: str) -> Tensor:
        """One tensor by its name on disk."""

    def slice(self, name: str) -> Any:
        """A safetensors slice of one tensor."""


def router_weight(checkpoint: StoredTensors, layer: MoELayer) -> Tensor:
    """The router's weight of a layer, ``(rows, d)`` with row ``e`` belonging to expert ``e``, in the stored dtype.

    Raises:
        CheckpointError: It is missing or not float, or its shape differs from that in the model of config.json.
        StreamingError: It is converted on loading.
    """
    name = only_source(layer.router, checkpoint.sources)
    shape = checkpoint.tensors[name].shape
    if shape != layer.router_is.shape:
        raise CheckpointError(
            f"{str(checkpoint.folder)!r}: {name!r} has shape {shape}, but its config.json says {layer.router_is.shape}"
        )
    check_float([name], checkpoint.tensors)
    weight = checkpoint.read(name)
    return weight.T if layer.router_transposed else weight


def expert_matrices(
    checkpoint: StoredTensors, layer: MoELayer, projection: str, neurons_alone: bool = False
) -> Iterator[Tensor]:
    """Yields one matrix of every expert in order, ``(out, in)`` in the stored dtype, one in memory at a time.

    Args:
        checkpoint: Where they are.
        layer: One of ``checkpoint.layers()``.
        projection: Which matrix.
        neurons_alone: Only the rows of the hidden neurons, for the first projection, ``(neurons, in)``.

    Raises:
        CheckpointError: A tensor is missing or not float, or its shape differs from that in the model of config.json.
        StreamingError: transformers converts these tensors by more than renaming, stacking and joining.
    """
    whole = torch.empty(layer.banks[projection].shape, device="meta")
    expected = (layer.neurons(whole) if neurons_alone else whole).shape
    for expert, matrix in enumerate(_read(checkpoint, layer, projection, neurons_alone)):
        if matrix.shape != expected:
            raise CheckpointError(
                f"{str(checkpoint.folder)!r}: {projection!r} of expert {expert} in layer {layer.name!r} has shape "
                f"{tuple(matrix.shape)}, but its config.json says {tuple(expected)}"
            )
        yield matrix


def _read(checkpoint: StoredTensors, layer: MoELayer, projection: str, neurons_alone: bool) -> Iterator[Tensor]:
    bank, sources = layer.banks[projection], checkpoint.sources
    parameter = bank.weights[0].name
    converted = [source for source in sources.get(parameter, []) if source.converter is not None]
    if len(bank.weights) == 1 and converted:  # not joined on disk: gate and up are tensors of their own
        stacked = stacked_sources(parameter, converted, bank.weights[0].shape[0])
        for names in stacked[: layer.num_experts]:  # the others are null experts
            check_float(names, checkpoint.tensors)
            parts = [checkpoint.read(name) for name in (names[:1] if neurons_alone else names)]
            yield parts[0] if len(parts) == 1 else torch.cat(parts)
        return
    stored = [only_source(weight.name, sources) for weight in bank.weights]
    check_float(stored, checkpoint.tensors)
    if len(stored) > 1:  # one tensor per expert
        matrices: Iterator[Tensor] = (checkpoint.read(name) for name in stored)
    else:
        (name,) = stored
        rows = bank.weights[0].shape[0] // layer.num_experts if len(bank.weights[0].shape) == 2 else 1
        ranges = (slice(expert * rows, (expert + 1) * rows) for expert in range(layer.num_experts))
        parts_of = (checkpoint.slice(name)[part] for part in ranges)
        one_each = (part.squeeze(0) if part.ndim == 3 else part for part in parts_of)
        matrices = (matrix.T if bank.transposed else matrix for matrix in one_each)
    for matrix in matrices:
        yield layer.neurons(matrix) if neurons_alone else matrix
