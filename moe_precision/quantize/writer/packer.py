"""Fills a model on the meta device for one shard at a time, and writes the result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.headers import CheckpointError
from ...checkpoints.sources import check_all_float, sources_of
from ...compat import dtype_plan
from ...files import save_tensors
from ..checksums import metadata
from ..config import PlanQuantizationConfig
from ..hf import PlanHfQuantizer
from .shards import Shard

_ERROR = re.compile(r"^([\w.]+Error)(?:: (.+))?$", re.MULTILINE)  # the line of a traceback that names the error


class Packer:
    """A float model on the meta device, whose weights are read, packed, written and dropped shard by shard.

    Args:
        checkpoint: The float checkpoint.
        quantization: What to do with it.

    Attributes:
        model: The model.
        quantizer: transformers' side of packing; knows the parameters that are yet to be packed.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: PlanQuantizationConfig) -> None:
        self.checkpoint, self.quantization = checkpoint, quantization
        self.model: PreTrainedModel = checkpoint.meta_model()
        self.quantizer = PlanHfQuantizer(quantization, pre_quantized=False)
        self.quantizer.preprocess_model(self.model)
        self._load = LoadStateDictConfig(
            dtype=checkpoint.dtype,
            dtype_plan=dtype_plan(self.model, checkpoint.dtype),
            hf_quantizer=self.quantizer,
            weight_mapping=get_model_conversion_mapping(self.model, None, self.quantizer),
        )

    def check_weights(self) -> None:
        """Checks that all weights are float, and by the routers that what comes with the plan belongs to them."""
        made_of = sources_of(self.model, self.checkpoint.tensors)
        check_all_float(self.model, made_of, self.checkpoint.tensors)
        if not self.quantization.weights_matter:
            return
        routers = [layer.shape.router for layer in self.quantization.plan.layers.values()]
        self._read({source.name for router in routers for source in made_of.get(router, [])})
        lost = [router for router in routers if self.model.get_parameter(router).is_meta]
        if lost:
            raise CheckpointError(f"{str(self.checkpoint.folder)!r} lacks {lost}")
        self.quantization.check_weights(self.quantizer.layers)
        for router in routers:
            _forget(self.model, router)

    @torch.no_grad()
    def _read(self, names: set[str]) -> None:
        """Loads some tensors of the checkpoint into the model, converted and packed."""
        tensors = {name: self.checkpoint.slice(name) for name in names}
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._load)
        problems = _problems(info)
        if problems:
            raise CheckpointError(f"{str(self.checkpoint.folder)!r} cannot be quantized: {problems[0]}")

    def write(self, shard: Shard, folder: Path, job: str) -> None:
        """Reads, packs and writes one shard.

        Raises:
            CheckpointError: A weight is missing, or cannot be converted or packed.
        """
        self._read(set(shard.sources))
        whole = self.model.state_dict()
        packed = {name: whole[name] for name in shard.tensors}
        empty = [name for name, tensor in packed.items() if tensor.is_meta]
        if empty:
            raise CheckpointError(f"{str(self.checkpoint.folder)!r} lacks {empty}")
        save_tensors(packed, folder / shard.file, {"format": "pt", **metadata(packed, self.quantization.digest(), job)})
        for name in shard.tensors:
            _forget(self.model, name)


def _problems(info: Any) -> list[Any]:
    """What transformers could not load; it keeps errors, out of memory included, as the text of a traceback."""
    failed = []
    for text in info.conversion_errors.values():
        errors = _ERROR.findall(text)
        failed.append(errors[-1][1] or errors[-1][0] if errors else text.strip())
    return [*failed, *info.mismatched_keys, *info.error_msgs]


def _forget(model: nn.Module, name: str) -> None:
    """Moves one tensor of a model back to the meta device."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, leaf)
    empty = tensor.detach().to("meta")
    setattr(module, leaf, nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty)


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
