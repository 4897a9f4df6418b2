"""What the files of a checkpoint hold, by their headers alone: whether all are intact, and which tensor is where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import MoEPrecisionError
from .hub import how_to_download, is_hub_name

FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names; those of 8 bits have a scale beside them
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of a model


class CheckpointError(MoEPrecisionError, ValueError):
    """A checkpoint folder that is missing, incomplete or damaged, or not of the kind that is needed."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: safetensors' own name: ``BF16``, ``I32``, ...
        shape: Its shape.
        nbytes: Bytes it takes in the file.
        file: The file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    @property
    def is_float(self) -> bool:
        """Whether its values are the weights themselves."""
        return self.dtype in FLOATS


def check_float(names: Iterable[str], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises `CheckpointError` for the first of some weights that holds codes of a quantizer instead of floats."""
    for name in names:
        if not tensors[name].is_float:
            raise CheckpointError(
                f"{str(tensors[name].file.parent)!r}: {name!r} is stored as {tensors[name].dtype}, which a quantizer "
                "writes, and its values are not the weights; give the float checkpoint"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a checkpoint's index names, or its only one; whether they exist is not checked.

    Raises:
        CheckpointError: The folder or its config.json is missing, it holds PEFT adapters, or the index is damaged.
    """
    if not folder.is_dir():
        advice = how_to_download(str(folder)) if is_hub_name(folder) else "expected what save_pretrained writes"
        raise CheckpointError(f"no checkpoint folder at {str(folder)!r}; {advice}")
    whole = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    if (folder / "adapter_config.json").is_file() and not whole:
        raise CheckpointError(f"{str(folder)!r} holds PEFT adapters, no model: {_merging(folder)}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{str(folder)!r} has no config.json; expected what save_pretrained writes")
    if not whole:
        _check_safetensors(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():  # as in transformers: an old index is ignored
        return [folder / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not UTF-8, not JSON, not a map of names
        raise CheckpointError(f"{str(index)!r} is damaged: {error}") from error


def _merging(folder: Path) -> str:
    """The two lines of code that make a checkpoint of an adapter."""
    try:
        task = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    except (ValueError, AttributeError):
        task = None
    kind = "Seq2SeqLM" if task == "SEQ_2_SEQ_LM" else "CausalLM"
    return (
        f"merge first, and give the merged folder (from peft import AutoPeftModelFor{kind})\n"
        f"  model = AutoPeftModelFor{kind}.from_pretrained({str(folder)!r}).merge_and_unload()\n"
        f"  model.save_pretrained({str(folder) + '-merged'!r})"
    )


def _check_safetensors(folder: Path) -> None:
    """Raises `CheckpointError` for a folder whose weights are somewhere else than where they are looked for."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    pickled = [name for name in names if name.startswith("pytorch_model")]
    if pickled:
        raise CheckpointError(
            f"{str(folder)!r} holds its weights as {pickled[0]!r}, and only safetensors are read: load it once with "
            "from_pretrained and write it with save_pretrained into another folder"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{str(folder)!r} has neither 'model.safetensors' nor 'model.safetensors.index.json', which name its "
            f"weights; it has {', '.join(others[:3])}: copy the index too, or write it again with save_pretrained"
        )


def header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name, in the order of its header.

    Raises:
        CheckpointError: The file is missing, truncated or damaged.
    """
    if not file.is_file():
        raise CheckpointError(f"{str(file.parent)!r} lacks the weight file {file.name!r}; copy it again")
    try:
        with safe_open(file, "pt", backend="pread"):  # checks the header against the file's size, and maps nothing
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{str(file)!r} is truncated or damaged: {error}; copy it again") from error
    with open(file, "rb") as opened:
        entries = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    entries.pop("__metadata__", None)
    return {
        name: StoredTensor(
            entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0], file
        )
        for name, entry in entries.items()
    }
