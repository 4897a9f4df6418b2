"""temporary"""

from __future__ import annotations

from pathlib import Path

from ..recording.curvature import curvature_path


def beside(kind: str, path: str | None) -> Path | None:
    if path is None:
        return None
    x = path.removesuffix(".json").removesuffix(".history.safetensors") + ".json"
    f = curvature_path(x) if kind == "curvature" else Path(x).with_suffix(f".{kind}.safetensors")
    return f if f.is_file() else None
