"""The one place where the config of a checkpoint is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .headers import CheckpointError


def config_of(checkpoint: str | os.PathLike[str], **kwargs: Any) -> PreTrainedConfig:
    """The config of a checkpoint folder, a config.json, or a model on the Hub by its name, as transformers reads it.

    Args:
        checkpoint: The folder, file or name.
        kwargs: For transformers, such as ``trust_remote_code=False``: refuse what needs code of its own, do not ask.
    """
    return AutoConfig.from_pretrained(checkpoint, **kwargs)


_KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' of old


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's config.json says of quantization, or the part of a model inside it; None for a float checkpoint.

    mlx-lm names no ``quant_method``; its is called ``mlx`` here.

    Raises:
        CheckpointError: config.json is damaged.
    """
    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(written, dict):
        raise CheckpointError(f"{str(path)!r} is damaged: expected a JSON object, got {written!r}")
    found = _quantization_in(written)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} is damaged: its quantization_config is {found!r}")
    return found


def _quantization_in(config: dict[str, Any]) -> Any:
    """The first statement of quantization in a config or in the configs of its parts; None if there is none."""
    by_mlx = config.get("quantization")
    if isinstance(by_mlx, dict) and "group_size" in by_mlx:
        return {"mode": "affine", **by_mlx, "quant_method": "mlx"}
    stated = next((config[key] for key in _KEYS if config.get(key)), None)
    parts = (
        part for key, part in config.items() if key.endswith("_config") and key not in _KEYS and isinstance(part, dict)
    )
    return stated if stated is not None else next(filter(None, map(_quantization_in, parts)), None)


def released(quantization: dict[str, Any] | None) -> str:
    """How to get a float checkpoint of a model that is published quantized alone, to end a message; else empty."""
    config = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}.get((quantization or {}).get("quant_method", ""))
    if config is None:
        return ""
    return (
        ". To make one of a release in this form: "
        f"from_pretrained(folder, quantization_config={config}(dequantize=True)), "
        "then save_pretrained(another folder, save_original_format=False)"
    )
