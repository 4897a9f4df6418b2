"""Reads parts of a float checkpoint into a model on the meta device, and forgets them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.dtypes import meta_model_of
from ...checkpoints.headers import CheckpointError
from ...checkpoints.sources import check_all_float, sources_of
from ...compat import dtype_plan, fill_buffers
from .shards import layer_of

_ERROR = re.compile(r"^([\w.]+Error)(?:: (.+))?$", re.MULTILINE)  # the line of a traceback that names the error


class PartlyLoaded:
    """A float model in float32, of which only some layers are in memory, and all that is in no layer.

    Args:
        checkpoint: Its checkpoint, open.

    Attributes:
        model: The model, in evaluation mode.
        layers: Name of a layer, as in ``model.layers.3`` -> its module.

    Raises:
        CheckpointError: A weight is missing or cannot be converted.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.model: PreTrainedModel = meta_model_of(checkpoint.model_class(), checkpoint.config, torch.float32).eval()
        self.model.requires_grad_(False)
        self._load = LoadStateDictConfig(
            dtype=torch.float32,
            dtype_plan=dtype_plan(self.model, torch.float32),
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        own = self.model.state_dict()
        self._made_of = sources_of(self.model, checkpoint.tensors)
        self._sources: dict[str, set[str]] = {}
        self._own: dict[str, list[str]] = {}
        check_all_float(self.model, self._made_of, checkpoint.tensors)
        for name, made_of in self._made_of.items():
            if name in own:
                self._sources.setdefault(self._part_of(name), set()).update(source.name for source in made_of)
        for name in own:
            self._own.setdefault(self._part_of(name), []).append(name)
        self.layers = {name: self.model.get_submodule(name) for name in self._own if name}
        fill_buffers(self.model)
        self.load("")

    def _part_of(self, name: str) -> str:
        """The layer of a tensor; empty for one in none, or in a list whose entries are no modules of their own."""
        layer = layer_of(name)
        return "" if layer == name else layer

    def load(self, layer: str) -> None:
        """Reads a layer; empty for all that is in none.

        Raises:
            CheckpointError: A weight is missing or cannot be converted.
        """
        read(self.model, self._checkpoint, self._sources.get(layer, ()), self._load, "read")
        self.model.requires_grad_(False)
        if not layer:  # such as an output head that is the embedding
            self.model.tie_weights()
        own = self.model.state_dict()
        if lost := [name for name in self._own.get(layer, ()) if own[name].is_meta]:
            raise CheckpointError(f"{str(self._checkpoint.folder)!r} lacks {lost}")

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, some weights of layers are in memory, such as the routers.

        Raises:
            CheckpointError: One is missing or cannot be converted.
        """
        names = list(names)
        sources = {source.name for name in names for source in self._made_of.get(name, [])}
        read(self.model, self._checkpoint, sources, self._load, "read")
        if lost := [name for name in names if self.model.get_parameter(name).is_meta]:
            raise CheckpointError(f"{str(self._checkpoint.folder)!r} lacks {lost}")
        yield
        for name in names:
            forget(self.model, name)

    def forget(self, layer: str) -> None:
        """Frees the memory of a layer."""
        for name in self._own[layer]:
            forget(self.model, name)


@torch.no_grad()
def read(
    model: PreTrainedModel, checkpoint: Checkpoint, names: Iterable[str], load: LoadStateDictConfig, what: str
) -> None:
    """Loads some tensors of a checkpoint into a model, converted.

    Args:
        model: The model.
        checkpoint: The checkpoint, open.
        names: Of tensors on disk.
        load: How they are converted.
        what: What cannot be done if that fails, as in ``quantized``.

    Raises:
        CheckpointError: One cannot be converted.
    """
    tensors = {name: checkpoint.slice(name) for name in names}
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, load)
    problems = _problems(info)
    if problems:
        raise CheckpointError(f"{str(checkpoint.folder)!r} cannot be {what}: {problems[0]}")


def forget(model: nn.Module, name: str) -> None:
    """Moves one tensor of a model back to the meta device."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, leaf)
    empty = tensor.detach().to("meta")
    setattr(module, leaf, nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty)


def _problems(info: Any) -> list[Any]:
    """What transformers could not load; it keeps errors, out of memory included, as the text of a traceback."""
    failed = []
    for text in info.conversion_errors.values():
        errors = _ERROR.findall(text)
        failed.append(errors[-1][1] or errors[-1][0] if errors else text.strip())
    return [*failed, *info.mismatched_keys, *info.error_msgs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off transformers' own bar for every shard."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
