"""Checkpoint folders: are they whole, what do their files hold, and how many bytes do their experts take."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import MoEPrecisionError
from ..plans.plan import PrecisionPlan

_OF_AN_EXPERT = re.compile(r"(?:^|\.)experts\.")


class CheckpointError(MoEPrecisionError, ValueError):
    """A checkpoint folder that is missing, incomplete or damaged."""


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint, after checking that all are there and whole.

    Raises:
        CheckpointError: The folder, its config.json or a shard is missing, or a file is truncated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {str(folder)!r}; expected what save_pretrained writes")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{str(folder)!r} has no config.json; expected what save_pretrained writes")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():  # as transformers: an old index is ignored
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # no UTF-8, no JSON, no map of names
            raise CheckpointError(f"{str(index)!r} is damaged: {error}") from error
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{str(folder)!r} lacks the weight file {file.name!r}; copy it again")
        try:
            with safe_open(file, "pt", backend="pread") as opened:  # maps nothing
                opened.keys()
        except SafetensorError as error:
            raise CheckpointError(f"{str(file)!r} is truncated or damaged: {error}; copy it again") from error
    return files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: safetensors' own name: ``BF16``, ``I32``, ...
        shape: Its shape.
        nbytes: Bytes it takes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def stored_tensors(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name on disk, read from the headers of its files."""
    found = {}
    for file in weight_files(folder):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), end - start)
    return found


def tensor_bytes(folder: str | os.PathLike) -> dict[str, int]:
    """Bytes that each tensor takes in a checkpoint's files, read from their headers."""
    return {name: tensor.nbytes for name, tensor in stored_tensors(folder).items()}


def stored_bits_per_expert_weight(folder: str | os.PathLike, plan: PrecisionPlan) -> float:
    """Bits a routed expert's weight takes in a checkpoint, measured from the bytes of its files.

    Counts every tensor below a module called ``experts``: codes, scales, offsets and sentinels, or float weights.

    Args:
        folder: A float or packed checkpoint.
        plan: Any plan for the same model, for the number of expert weights.
    """
    weights = sum(layer.shape.expert_size * layer.shape.num_experts for layer in plan.layers.values())
    in_bytes = sum(size for name, size in tensor_bytes(folder).items() if _OF_AN_EXPERT.search(name))
    if in_bytes == 0:
        raise CheckpointError(f"{os.fspath(folder)!r} has no tensor below a module called 'experts'")
    return 8 * in_bytes / weights


def load_model(folder: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint with the class that its config names; keyword arguments go to ``from_pretrained``.

    Raises:
        CheckpointError: The folder is incomplete, or names a class that transformers does not have.
    """
    weight_files(folder)
    return model_class_of(folder, AutoConfig.from_pretrained(folder)).from_pretrained(folder, **kwargs)


def model_class_of(folder: str | os.PathLike, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint's config names.

    Raises:
        CheckpointError: transformers does not have it.
    """
    architectures = config.architectures or []
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    if model_class is None:
        raise CheckpointError(f"{os.fspath(folder)!r} names architectures {architectures}, which transformers lacks")
    return model_class


def check_quantizing(checkpoint: str | os.PathLike, out: str | os.PathLike, *sources: Any) -> PreTrainedConfig:
    """The config of a float checkpoint, after checking that writing ``out`` takes nothing away that is read.

    Args:
        checkpoint: Folder of the float checkpoint.
        out: Folder that will be written, or replaced.
        sources: Whatever else is read; those that are paths are looked at.

    Raises:
        CheckpointError: The checkpoint is quantized already, or ``out`` lies in what is read or the other way round.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{os.fspath(checkpoint)!r} is quantized already; quantize the float checkpoint instead")
    if Path(out).resolve().is_relative_to(Path(checkpoint).resolve()):
        raise CheckpointError(f"{os.fspath(out)!r} is, or lies in, the float checkpoint; choose another folder")
    for source in (checkpoint, *sources):
        if isinstance(source, str | os.PathLike) and Path(source).resolve().is_relative_to(Path(out).resolve()):
            raise CheckpointError(f"{os.fspath(out)!r} would be replaced, and {os.fspath(source)!r} lies in it")
    return config


def empty_model(folder: str | os.PathLike, config: PreTrainedConfig) -> PreTrainedModel:
    """A checkpoint's float model on the meta device: names and shapes, no weight is allocated."""
    with torch.device("meta"):
        return model_class_of(folder, config)._from_config(config)
