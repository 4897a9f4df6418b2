"""Which files will be written, what each holds and what it is made from: known before any weight is read."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass

from transformers import PreTrainedModel

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.headers import CheckpointError
from ...checkpoints.sources import Sources, StreamingError, sources_of, stacked_sources
from ...compat import may_be_missing, may_be_unused, tied_names
from ..replace import Target, packed_tensors

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")  # up to the first index: a decoder layer


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        file: Its name.
        tensors: Names of what it will hold.
        sources: Names of the float tensors that these are made from.
        nbytes: Bytes of the sources.
        packed_bytes: Bytes of the tensors.
    """

    file: str
    tensors: tuple[str, ...]
    sources: tuple[str, ...]
    nbytes: int
    packed_bytes: int


def shards_of(
    checkpoint: Checkpoint, model: PreTrainedModel, targets: list[Target], group_size: int, max_bytes: int
) -> list[Shard]:
    """What to write, whole layers together, after checking that the checkpoint has everything needed.

    Args:
        checkpoint: The float checkpoint.
        model: Its model on the meta device.
        targets: The parameters that will be packed.
        group_size: Weights that share a scale and an offset.
        max_bytes: Largest packed file; a larger layer gets a file of its own.

    Raises:
        CheckpointError: The checkpoint lacks a tensor of the model, or has one of a different shape.
    """
    own = model.state_dict()
    made_of = sources_of(model, checkpoint.tensors)
    read = {result for name, tensors in made_of.items() for source in tensors for result in source.results(name)}
    _check_names(checkpoint, model, made_of, read)
    _check_shapes(checkpoint, model, made_of)
    sources: dict[str, set[str]] = defaultdict(set)  # layer -> tensors on disk
    for name, tensors in made_of.items():
        if name in own:
            sources[layer_of(name)] |= {source.name for source in tensors}
    by_layer: dict[str, dict[str, int]] = defaultdict(dict)  # layer -> packed tensor -> bytes
    for name, nbytes in packed_tensors(model, targets, group_size).items():
        if name in read or name not in own:
            by_layer[layer_of(name)][name] = nbytes
    groups = _grouped({layer: sum(sizes.values()) for layer, sizes in by_layer.items()}, max_bytes)
    one = len(groups) == 1
    return [
        Shard(
            file="model.safetensors" if one else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tensors=tuple(name for layer in layers for name in by_layer[layer]),
            sources=tuple(sorted(name for layer in layers for name in sources[layer])),
            nbytes=sum(checkpoint.tensors[name].nbytes for layer in layers for name in sources[layer]),
            packed_bytes=size,
        )
        for number, (layers, size) in enumerate(groups, start=1)
    ]


def divided(shards: list[Shard], among: int) -> list[list[Shard]]:
    """Gives each of several ranks about as many bytes: the largest shards first, each to the one that has least.

    Every shard is in one of the lists, which keep the order of ``shards``; the same input is always divided alike.
    """
    owned: list[list[int]] = [[] for _ in range(among)]
    nbytes = [0] * among
    for number in sorted(range(len(shards)), key=lambda number: -shards[number].nbytes):
        least = nbytes.index(min(nbytes))
        owned[least].append(number)
        nbytes[least] += shards[number].nbytes
    return [[shards[number] for number in sorted(numbers)] for numbers in owned]


def _grouped(sizes: dict[str, int], max_bytes: int) -> list[tuple[list[str], int]]:
    """Layers in their order, as many together as fit, with the bytes of each group."""
    groups: list[tuple[list[str], int]] = []
    for layer, size in sizes.items():
        if not groups or groups[-1][1] + size > max_bytes:
            groups.append(([], 0))
        groups[-1] = [*groups[-1][0], layer], groups[-1][1] + size
    return groups


def _check_names(checkpoint: Checkpoint, model: PreTrainedModel, made_of: Sources, read: set[str]) -> None:
    """Warns of tensors on disk that the model does not have; raises for those of the model that are not on disk."""
    own = model.state_dict()
    unknown = {source.name for name, tensors in made_of.items() if name not in own for source in tensors}
    unknown = {name for name in unknown if not may_be_unused(model, name)}
    if unknown:
        warnings.warn(f"{len(unknown)} tensors are not in the model, left out: {sorted(unknown)[:3]}", stacklevel=4)
    elsewhere = _tied_to(model, read) - read  # stored under another name
    missing = [name for name in own if name not in elsewhere | read and not may_be_missing(model, name)]
    if missing:
        raise CheckpointError(f"{str(checkpoint.folder)!r} lacks {sorted(missing)}")


def _check_shapes(checkpoint: Checkpoint, model: PreTrainedModel, made_of: Sources) -> None:
    """Raises for tensors whose shape, or number of experts, would be found wrong after hours of packing."""
    for name, parameter in model.state_dict().items():
        sources = made_of.get(name, [])
        converted = [source for source in sources if source.converter is not None]
        for stored in (checkpoint.tensors[source.name] for source in sources if source.converter is None):
            if stored.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{str(checkpoint.folder)!r} cannot be quantized: {name!r} has shape {stored.shape}, but its "
                    f"config.json says {tuple(parameter.shape)}"
                )
        if converted:
            try:
                stacked_sources(name, converted, parameter.shape[0])
            except StreamingError:  # other conversions check their own tensors
                continue
            except CheckpointError as error:
                raise CheckpointError(f"{str(checkpoint.folder)!r} cannot be quantized: {error}") from error


def _tied_to(model: PreTrainedModel, read: set[str]) -> set[str]:
    """All names of the tensors that are read under one of them."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name, source in tied_names(model).items():
        groups[source] |= {name, source}
    return {name for group in groups.values() if group & read for name in group}


def layer_of(name: str) -> str:
    """The path of the layer that a tensor belongs to; others are on their own."""
    layer = _LAYER.match(name)
    return layer.group() if layer else name
