"""The files beside the weights of a checkpoint: which belong to the model, and go with it into a new folder.

Tokenizers, chat templates, code, and the modules of a pipeline belong to it at any depth. Other copies of its weights,
adapters, what another quantizer left, and the state of a training run would be wrong there.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

_OTHER_RUNTIMES = (  # weights for other programs, wrong beside any checkpoint
    *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel"),
    *("*.ckpt", "*.distcp", "*.pyc"),
)
_OF_TRAINING = (
    *("optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scaler*.pt", "rng_state*.pth", "training_args.bin"),
    *("trainer_state.json", "zero_to_fp32.py", "latest"),
)
_OF_ADAPTERS = ("adapter_config.json", "adapter_model.*")
_OF_QUANTIZERS = ("quantize_config.json", "quantization_config.json", "hf_quant_config.json", "quant_config.json")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.pth", "*model*.bin", "*model*.pt")
_OTHER_COPIES = ("original", "metal", "onnx", "openvino", "coreml", "gguf", "checkpoint-*", "global_step*")


def copy_other_files(source: Path, folder: Path) -> None:
    """Copies what belongs to a model beside its weights and config, at any depth; nothing is written over.

    Warns with the names of what it leaves behind, apart from weights that the new folder replaces.

    Args:
        source: A checkpoint folder.
        folder: The new checkpoint, whose config.json and weights were written already.
    """
    left: list[str] = []
    for path in _belonging(source, source, _model_type(source / "config.json"), _modules(source), left):
        target = folder / path.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    if any(fnmatch(name, pattern) for name in left for pattern in _OF_ADAPTERS):
        warnings.warn(
            f"{str(source)!r} holds an adapter, which was left out: the weights in the folder itself were taken, as "
            "they are. If the adapter belongs to the model, merge it first (merge_and_unload) and save the result",
            stacklevel=4,
        )
    others = sorted(name for name in left if not any(fnmatch(name, pattern) for pattern in _OF_ADAPTERS))
    if others:
        warnings.warn(
            f"left out, as weights of another kind or the state of a training: {', '.join(others)}; copy by hand what "
            "the model needs of it",
            stacklevel=4,
        )


def _belonging(source: Path, part: Path, model_type: str | None, modules: set[Path], left: list[str]) -> Iterator[Path]:
    """Files of a folder and those below it that belong to the model; adds the names of others to ``left``.

    Args:
        source: The checkpoint.
        part: The folder to look at: the checkpoint or one inside it.
        model_type: The checkpoint's.
        modules: Folders that the checkpoint names as its parts.
        left: Grows.
    """
    for path in sorted(part.iterdir()):
        name = path.relative_to(source).as_posix()
        if path.is_dir():
            if (
                path.name.startswith(".")
                or path.name == "__pycache__"
                or source.resolve().is_relative_to(path.resolve())
            ):
                continue  # what tools keep for themselves, or a link back
            if path not in modules and _is_another_copy(path, model_type):
                left.append(f"{name}/")
                continue
            yield from _belonging(source, path, model_type, modules, left)
        elif path.is_file():
            if any(
                fnmatch(path.name, one) for one in (*_OTHER_RUNTIMES, *_OF_TRAINING, *_OF_ADAPTERS, *_OF_QUANTIZERS)
            ):
                left.append(name)
            elif part != source or not (path.name == "config.json" or any(fnmatch(path.name, one) for one in _WEIGHTS)):
                yield path


def _is_another_copy(folder: Path, model_type: str | None) -> bool:
    """Whether a folder inside a checkpoint holds the model once more, or a moment of its training."""
    if (
        any(fnmatch(folder.name.lower(), pattern) for pattern in _OTHER_COPIES)
        or (folder / "trainer_state.json").exists()
    ):
        return True
    weights = any(fnmatch(file.name, pattern) for file in folder.iterdir() for pattern in _WEIGHTS)
    return weights and model_type is not None and _model_type(folder / "config.json") == model_type


def _model_type(config: Path) -> str | None:
    found = _json(config)
    return found.get("model_type") if isinstance(found, dict) else None


def _modules(source: Path) -> set[Path]:
    """Folders of the modules that sentence-transformers runs after the model."""
    found = _json(source / "modules.json")
    parts = found if isinstance(found, list) else []
    return {source / part["path"] for part in parts if isinstance(part, dict) and part.get("path")}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
