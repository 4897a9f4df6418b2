"""A checksum for every tensor of a packed checkpoint, in the metadata of its safetensors files.

A flipped bit in packed codes is a wrong weight that nothing else would notice, so each tensor is checked, with its
name, dtype and shape, before any of them is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import MoEPrecisionError

_SUMS, _CONFIG, _SET = (f"moe_precision.{name}" for name in ("xxh3_64", "config", "set"))


class DamagedCheckpointError(MoEPrecisionError, ValueError):
    """A packed checkpoint whose files are not what was written."""


def checksum(name: str, tensor: Tensor) -> str:
    """XXH3 (64 bits) of a tensor's name, dtype, shape and bytes."""
    value = xxhash.xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    value.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return value.hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> `checksum`, for what is not on the meta device."""
    return {name: checksum(name, tensor) for name, tensor in tensors.items() if not tensor.is_meta}


def metadata(tensors: Mapping[str, Tensor], config: str, one_set: str | None = None) -> dict[str, str]:
    """The metadata of every file of a packed checkpoint.

    Args:
        tensors: All that the file holds, or more.
        config: Digest of what config.json says of widths: `PlanQuantizationConfig.digest`.
        one_set: Equal in all files that were written together; None to derive it from these tensors.
    """
    sums = json.dumps(checksums(tensors), sort_keys=True)
    return {_SUMS: sums, _CONFIG: config, _SET: one_set or xxhash.xxh3_64(sums.encode()).hexdigest()}


def check_files(files: Iterable[str | os.PathLike[str]], config: str) -> set[str]:
    """Reads every tensor of a packed checkpoint, one at a time, and compares it with its checksum.

    Args:
        files: All of its safetensors files.
        config: Digest of what its config.json says.

    Returns:
        The names of all tensors.

    Raises:
        DamagedCheckpointError: A file is damaged or truncated, lacks a checksum, was written with other files or
            another config.json, or holds a tensor twice; or there is a second checkpoint beside it.
    """
    paths = [Path(file) for file in files]
    for folder in {path.parent for path in paths}:  # saving one leaves the other there, and transformers reads that
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        if shards and (folder / SAFE_WEIGHTS_NAME).exists():
            raise DamagedCheckpointError(
                f"{str(folder)!r} holds two checkpoints, one in {SAFE_WEIGHTS_NAME} and one in {shards[0].name} and "
                "others: delete the older one"
            )
    seen: set[str] = set()
    sets: set[str] = set()
    for file in paths:
        name = repr(os.fspath(file))
        try:
            with safe_open(file, "pt", backend="pread") as opened:
                held = opened.metadata() or {}
                expected = json.loads(held.get(_SUMS, "null"))
                if not isinstance(expected, dict):
                    raise DamagedCheckpointError(
                        f"{name} has no checksums: it is damaged, or was written before there were any; "
                        "quantize the float checkpoint again"
                    )
                for tensor in opened.keys():  # noqa: SIM118
                    if tensor in seen or expected.get(tensor) != checksum(tensor, opened.get_tensor(tensor)):
                        raise DamagedCheckpointError(
                            f"{name} is damaged: {tensor!r} is not what was written; copy it again"
                        )
                    seen.add(tensor)
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise DamagedCheckpointError(f"{name} is truncated or damaged: {error}") from error
        sets.add(held.get(_SET, ""))
        if held.get(_CONFIG) != config or len(sets) > 1:
            raise DamagedCheckpointError(
                f"{name} does not belong to the config.json or the other files beside it; copy the checkpoint again"
            )
    return seen
