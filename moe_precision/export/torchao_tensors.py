"""Matrices as torchao flattens them into safetensors: parts of a tensor subclass, which the file's metadata describes.

``wi.weight`` is stored as ``wi._weight_qdata``, ``wi._weight_scale`` and so on, and the metadata of the file has its
class under ``wi.weight``. torchao quantizes modules alone unless it is told otherwise, so fused experts stay float.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..checkpoints.headers import CheckpointError
from .stored_forms import Stored, Tensors

_UNPACKED = "IntxUnpackedToInt8Tensor"  # codes of 1 to 8 bits, each in a byte
_BY_BYTES = {  # class -> bits of a weight in its packed part
    "Int8Tensor": 8,
    "Float8Tensor": 8,
    "Int4Tensor": 4,
    "Int4PlainInt32Tensor": 4,
    "Int4TilePackedTo4dTensor": 4,
    "NVFP4Tensor": 4,
}
_WAY_OUT = "save_pretrained of transformers 5 writes it: load the checkpoint with from_pretrained, and save it again"


def metadata_of(files: Iterable[Path]) -> dict[str, str]:
    """What the headers of safetensors files say beside their tensors, all files together."""
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt", backend="pread") as opened:
            found |= opened.metadata() or {}
    return found


def parts_of(parameter: str) -> str:
    """The name in the file of a parameter's codes."""
    module, _, leaf = parameter.rpartition(".")
    return f"{module}._{leaf}_qdata"


def torchao(
    parameter: str, described_as: Iterable[str], metadata: dict[str, str], tensors: Tensors, shape: tuple[int, ...]
) -> Stored:
    """The bits of one parameter, ``(out, in)`` or ``(experts, out, in)``, whose codes are in the file.

    Args:
        parameter: Its name in the file.
        described_as: Names under which the metadata may have it: transformers renames tensors, not the metadata.
        metadata: `metadata_of` the checkpoint.
        tensors: Those of the checkpoint.
        shape: The shape of the float matrix.

    Raises:
        CheckpointError: The metadata lacks it, or its class or its codes are not understood.
    """
    codes = tensors[parts_of(parameter)]
    said = next((metadata[name] for name in described_as if name in metadata), None)
    try:
        described: dict[str, Any] = json.loads(said or "")
        kind, data = described["_type"], described["_data"]
        block = data["block_size"]
        size = block if isinstance(block, int) else block[-1]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{parameter!r} is a tensor of torchao, but the file's metadata says {said!r} of it, which cannot be read. "
            + _WAY_OUT
        ) from error
    weights = math.prod(shape)
    if kind == _UNPACKED:
        target = str((data.get("target_dtype") or {}).get("_data"))
        bits = int(target[3:]) if target in {f"int{width}" for width in range(1, 9)} else 0
        in_bytes = weights
    else:
        bits = _BY_BYTES.get(kind, 0)
        target, in_bytes = kind, weights * bits // 8
    if not bits:
        raise CheckpointError(
            f"{parameter!r} is a {kind} of torchao ({target}), whose bits cannot be read; known are "
            f"{_UNPACKED}, {', '.join(_BY_BYTES)}"
        )
    if codes.nbytes != in_bytes or not isinstance(size, int) or size < 1 or shape[-1] % size:
        raise CheckpointError(
            f"{parameter!r}: its codes are {codes.dtype} {codes.shape} in groups of {size}, expected {in_bytes} bytes "
            f"for {bits} bits of {shape} in the model of config.json, and groups that divide {shape[-1]}"
        )
    return Stored(bits, size)
