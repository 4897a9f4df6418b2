"""Reads an offline wandb run back: LevelDB log framing around protobuf records (wandb has no reader of its own)."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = 7  # crc, length, type


def read_records(path: Path) -> list[Any]:
    """All records of a ``.wandb`` file; call ``wandb.finish(); wandb.teardown()`` first, or the end may be missing."""
    data, place, records, parts = path.read_bytes(), 7, [], []
    while place < len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + _HEADER : place + _HEADER + length])
        place += _HEADER + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            records.append(record)
            parts = []
    return records


def read_curves(path: Path, x: str = "trainer/global_step") -> dict[str, list[tuple[int, Any]]]:
    """Logged key -> list of (value of ``x``, value)."""
    curves: dict[str, list[tuple[int, Any]]] = {}
    for record in read_records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            curves.setdefault(key, []).append((row.get(x, -1), value))
    return curves


def read_artifacts(path: Path) -> list[Any]:
    """The artifacts that a run logged."""
    return [r.artifact for r in read_records(path) if r.WhichOneof("record_type") == "artifact"] + [
        r.request.log_artifact.artifact
        for r in read_records(path)
        if r.WhichOneof("record_type") == "request" and r.request.HasField("log_artifact")
    ]
