"""A checkpoint folder that is opened once: its config, what its files hold, and its tensors one at a time.

No model is loaded to look at one. Its class is laid out on the meta device for names and shapes alone, and the mapping
of transformers says which tensors on disk, under their hub names, make up a router or the experts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..layers.moe_layers import MoELayer, find_moe_layers
from ..layers.patterns import Patterns
from ..plans.plan import PrecisionPlan, model_type_of
from .config import config_of, quantization_of
from .dtypes import meta_model_of
from .headers import DTYPES as _DTYPES
from .headers import CheckpointError, StoredTensor, header, weight_files
from .hub import local_folder, name_of
from .matrices import expert_matrices, router_weight
from .sources import Sources, sources_of, with_aliases

_OF_AN_EXPERT = re.compile(r"(?:^|\.)(?:experts|switch_mlp|switch_glu)\.")  # the last two are mlx-lm's


class Checkpoint:
    """A checkpoint folder, checked when it is made: config.json is there, and all weight files are there and intact.

    Files are opened when a tensor is first read, each once, and read without mapping them; `close`, or the end of a
    ``with`` block, closes them. A pickled one is opened again where it is unpickled.

    Args:
        folder: What ``save_pretrained`` writes: config.json and safetensors files, one or several, with tensors under
            hub names or those of the module tree. Or the name of a model that is in the Hub's cache on this machine.

    Attributes:
        folder: The folder.
        files: Its safetensors files.
        tensors: Every tensor by its name on disk, as the headers of the files describe it.
        quantization: The ``quantization_config`` of config.json, of whichever quantizer; None for a float checkpoint.

    Raises:
        CheckpointError: The folder, its config.json or a weight file is missing, truncated or damaged.

    Example:
        >>> with Checkpoint("checkpoint") as checkpoint:
        ...     layer = checkpoint.layers()[0]
        ...     checkpoint.router_weight(layer).shape
        torch.Size([8, 64])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = local_folder(folder)
        self._path = Path(os.path.abspath(self.folder))  # whatever the working directory is later
        self.files = [self._path / file.name for file in weight_files(self.folder)]
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self.tensors |= header(file)
        self.quantization = quantization_of(self._path)
        self._handles: dict[Path, Any] = {}
        self._opened = ExitStack()

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Path]]:
        return Checkpoint, (self._path,)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files; reading another tensor opens its file again."""
        self._handles.clear()
        self._opened.close()

    def _handle(self, name: str) -> Any:
        if name not in self.tensors:
            raise CheckpointError(f"{str(self.folder)!r} has no tensor {name!r}")
        file = self.tensors[name].file
        if file not in self._handles:
            # read and not mapped, so that the memory of a tensor is free again as soon as nobody needs it
            self._handles[file] = self._opened.enter_context(safe_open(file, "pt", backend="pread"))
        return self._handles[file]

    def read(self, name: str) -> Tensor:
        """One tensor by its name on disk.

        Raises:
            CheckpointError: There is no tensor of this name.
        """
        found: Tensor = self._handle(name).get_tensor(name)
        return found

    def slice(self, name: str) -> Any:
        """A safetensors slice: indexing it reads that part of a tensor, ``[...]`` all of it.

        Raises:
            CheckpointError: There is no tensor of this name.
        """
        return self._handle(name).get_slice(name)

    @property
    def name(self) -> str:
        """The folder's own name, or that of the model where it is in the Hub's cache."""
        return name_of(self._path)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_quantized(self) -> bool:
        """Whether config.json names a quantizer."""
        return self.quantization is not None

    @property
    def quantizer(self) -> str:
        """Name of the quantizer in config.json, for messages; empty for a float checkpoint."""
        return "" if self.quantization is None else str(self.quantization.get("quant_method", "unknown"))

    @cached_property
    def config(self) -> PreTrainedConfig:
        """config.json as transformers reads it."""
        return config_of(self._path)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in config.json, else that of the first floating tensor, as transformers chooses it."""
        stored = (_DTYPES[tensor.dtype] for tensor in self.tensors.values() if tensor.dtype in _DTYPES)
        return self.config.dtype or next(stored, torch.float32)

    def model_class(self) -> type[PreTrainedModel]:
        """The class that config.json names.

        Raises:
            CheckpointError: transformers does not have it.
        """
        architectures = self.config.architectures or []
        model_class = getattr(transformers, architectures[0], None) if architectures else None
        if model_class is None:
            raise CheckpointError(f"{str(self.folder)!r} names architectures {architectures}, which transformers lacks")
        found: type[PreTrainedModel] = model_class
        return found

    def meta_model(self) -> PreTrainedModel:
        """A new float model on the meta device: names, shapes and dtypes, no weight is allocated.

        Raises:
            CheckpointError: transformers does not have the class that config.json names.
        """
        return meta_model_of(self.model_class(), self.config, self.dtype)

    @cached_property
    def _meta_model(self) -> PreTrainedModel:
        return self.meta_model()

    @property
    def model_type(self) -> str:
        """The model's type, as plans and histories name it."""
        return model_type_of(self._meta_model)

    @cached_property
    def sources(self) -> Sources:
        """Parameter of the model -> the tensors on disk that make it up, under all names that a parameter has."""
        return with_aliases(self._meta_model, sources_of(self._meta_model, self.tensors))

    def layers(self, patterns: Patterns | None = None) -> list[MoELayer]:
        """The Mixture-of-Experts layers of the model, which is on the meta device.

        Args:
            patterns: ``router_pattern`` and ``expert_pattern`` for `find_moe_layers`.

        Raises:
            MoELayerError: There is none, or one that is not understood.
        """
        return find_moe_layers(self._meta_model, **(patterns or Patterns()))

    def router_weight(self, layer: MoELayer) -> Tensor:
        """The router's weight of a layer, ``(rows, d)`` with row ``e`` belonging to expert ``e``, in the stored dtype.

        Raises:
            CheckpointError: It is missing, or its shape differs from that in the model of config.json.
            StreamingError: It is converted on loading.
        """
        return router_weight(self, layer)

    def matrices(self, layer: MoELayer, projection: str, neurons_alone: bool = False) -> Iterator[Tensor]:
        """Yields one matrix of every expert in order, ``(out, in)`` in the stored dtype, one in memory at a time.

        Args:
            layer: One of `layers`.
            projection: Which matrix.
            neurons_alone: Only the rows of the hidden neurons, for the first projection, ``(neurons, in)``.

        Raises:
            CheckpointError: A tensor is missing, or its shape differs from that in the model of config.json.
            StreamingError: transformers converts these tensors by more than renaming, stacking and joining.
        """
        return expert_matrices(self, layer, projection, neurons_alone)

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """Loads the model with the class that config.json names; keyword arguments go to ``from_pretrained``.

        Raises:
            CheckpointError: transformers does not have that class.
        """
        return self.model_class().from_pretrained(self._path, **kwargs)

    def stored_bits_per_expert_weight(self, plan: PrecisionPlan) -> float:
        """Bits that a routed expert's weight takes, measured from the bytes of the files.

        Counts every tensor below a module called ``experts``: codes, scales, offsets and sentinels, or float weights.

        Args:
            plan: Any plan for the same model, for the number of expert weights.

        Raises:
            CheckpointError: There is no such tensor.
        """
        weights = sum(layer.shape.expert_size * layer.shape.num_experts for layer in plan.layers.values())
        in_bytes = sum(tensor.nbytes for name, tensor in self.tensors.items() if _OF_AN_EXPERT.search(name))
        if in_bytes == 0:
            raise CheckpointError(f"{str(self.folder)!r} has no tensor below a module called 'experts'")
        return 8 * in_bytes / weights


def load_model(folder: Checkpoint | str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint with the class that its config names; keyword arguments go to ``from_pretrained``.

    Raises:
        CheckpointError: The folder is incomplete or damaged, or names a class that transformers does not have.

    Example:
        >>> load_model("checkpoint", dtype="float32").config.model_type
        'mixtral'
    """
    with opened(folder) as checkpoint:
        return checkpoint.load(**kwargs)


@contextmanager
def opened(checkpoint: Checkpoint | str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Yields an open checkpoint as it is; opens a folder, and closes it at the end of the block."""
    if isinstance(checkpoint, Checkpoint):
        yield checkpoint
        return
    with Checkpoint(checkpoint) as found:
        yield found
