"""Whether what an earlier run left belongs to the same job, and is intact."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open
from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint
from ...version import __version__
from ..checksums import DamagedCheckpointError, check_files, checksums
from ..config import PlanQuantizationConfig
from .shards import Shard

_MEGABYTE = 1 << 20


def parts(checkpoint: Checkpoint, quantization: PlanQuantizationConfig, shards: list[Shard]) -> dict[str, str]:
    """All that decides on the shards -> a hash of it."""
    files = [checkpoint.folder / "config.json", *checkpoint.files]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns, _ends(file)) for file in files]
    said = {
        "release of moe-precision": __version__,
        "checkpoint": stats,
        "plan or width of other layers": quantization.to_dict(),
        "curvature, grid or statistics": [checksums(tensors) for tensors in _tensors_of(quantization)],
        "division into files": [asdict(shard) for shard in shards],
    }
    return {part: _hash(value) for part, value in said.items()}


def fingerprint(parts: dict[str, str]) -> str:
    """A hash that two runs share if they would write the same shards, from their `parts`."""
    return _hash(parts)


def _ends(file: Path) -> str:
    """A hash of the first and the last megabyte: copies of one size and time may still differ."""
    with file.open("rb") as opened:
        first = opened.read(_MEGABYTE)
        opened.seek(max(0, file.stat().st_size - _MEGABYTE))
        return xxhash.xxh3_128(first + opened.read()).hexdigest()


def _hash(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_finished(file: Path, shard: Shard, config: str) -> bool:
    """Whether an interrupted run left this shard intact.

    Args:
        file: Where it would be.
        shard: What it should hold.
        config: Digest of the widths: `PlanQuantizationConfig.digest`.
    """
    if not file.is_file():
        return False
    try:
        check_files([file], config)
        with safe_open(file, "pt") as opened:
            return set(opened.keys()) == set(shard.tensors)
    except DamagedCheckpointError:
        return False


def _tensors_of(given: PlanQuantizationConfig) -> list[dict[str, Tensor]]:
    """All tensors that a fit depends on."""
    curvature, grid, statistics = given.curvature, given.grid, given.statistics
    kinds = [] if curvature is None else [curvature.rows, curvature.columns]
    kinds += [] if grid is None else [grid.scales, grid.offsets, grid.codes]
    kinds += [] if statistics is None else [statistics.diagonals, statistics.correlations]
    found = [{f"{layer}.{p}": t for layer, of in kind.items() for p, t in of.items()} for kind in kinds]
    if statistics is None:
        return found
    return [*found, statistics.tokens, statistics.linears.diagonals, statistics.linears.correlations]
