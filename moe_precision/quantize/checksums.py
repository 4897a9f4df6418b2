"""A checksum for every tensor of a packed checkpoint, in the metadata of its safetensors files.

A flipped bit in packed codes is a wrong weight that nothing else would notice, so that each tensor is checked, with its
name, dtype and shape, before any of them is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

_KEY = "moe_precision.xxh3_64"


class DamagedCheckpointError(ValueError):
    """A packed checkpoint whose files are not what was written."""


def checksum(name: str, tensor: Tensor) -> str:
    """XXH3 (64 bits) of a tensor's name, dtype, shape and bytes."""
    value = xxhash.xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    value.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return value.hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file that holds these tensors, or some of them."""
    return {_KEY: json.dumps({name: checksum(name, tensor) for name, tensor in tensors.items() if not tensor.is_meta})}


def check_files(files: Iterable[str | os.PathLike]) -> None:
    """Reads every tensor of a packed checkpoint, one at a time, and compares it with its checksum.

    Raises:
        DamagedCheckpointError: A file is damaged or truncated, lacks a checksum, or holds a tensor twice.
    """
    seen: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt", backend="pread") as opened:
                expected = json.loads((opened.metadata() or {}).get(_KEY, "null"))
                if not isinstance(expected, dict):
                    raise DamagedCheckpointError(
                        f"{os.fspath(file)!r} has no checksums: it is damaged, or older than they are; "
                        "quantize the float checkpoint again"
                    )
                for name in opened.keys():  # noqa: SIM118
                    if name in seen or expected.get(name) != checksum(name, opened.get_tensor(name)):
                        raise DamagedCheckpointError(
                            f"{os.fspath(file)!r} is damaged: {name!r} is not what was written; copy it again"
                        )
                    seen.add(name)
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise DamagedCheckpointError(f"{os.fspath(file)!r} is truncated or damaged: {error}") from error
