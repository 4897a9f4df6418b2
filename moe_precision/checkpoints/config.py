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


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` in a folder's config.json, or in its text model's part; None for a float checkpoint.

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
    inner = written.get("text_config")
    found = written.get("quantization_config")
    if not found and isinstance(inner, dict):
        found = inner.get("quantization_config")
    if found and not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} is damaged: its quantization_config is {found!r}")
    return found or None
