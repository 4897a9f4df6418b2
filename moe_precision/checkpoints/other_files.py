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

_WRONG = (  # beside any other weights
    *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel"),
    *("optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scaler*.pt", "rng_state*.pth", "training_args.bin"),
    *("trainer_state.json", "zero_to_fp32.py", "latest", "*.ckpt", "*.distcp", "*.pyc"),
    *("quantize_config.json", "quantization_config.json", "hf_quant_config.json", "quant_config.json"),
)
_OF_ADAPTERS = ("adapter_config.json", "adapter_model.*")
_OWN = ("config.json", "model*.safetensors", "model*.safetensors.index.json")  # of which the new folder has others
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.pth", "*model*.bin", "*model*.pt")
_OTHER_COPIES = ("original", "metal", "onnx", "openvino", "coreml", "gguf", "checkpoint-*", "global_step*")


def copy_other_files(source: Path, folder: Path) -> None:
    """Copies what belongs to a model beside its weights and config, at any depth; nothing is written over.

    Warns with the names of what it leaves behind, apart from the weights that the new folder has in another form.

    Args:
        source: A checkpoint folder.
        folder: The new checkpoint, whose config.json and weights were written already.
    """
    files = _OtherFiles(source)
    for path in files.belonging(source, ()):
        target = folder / path.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    adapters = [name for name in files.left if _matches(name, _OF_ADAPTERS)]
    others = [name for name in files.left if name not in adapters]
    if adapters:
        warnings.warn(
            f"{str(source)!r} holds an adapter, which was left out: the weights in the folder itself were taken, as "
            "they are. If the adapter belongs to the model, merge it first (merge_and_unload) and save the result",
            stacklevel=3,
        )
    if others:
        warnings.warn(
            f"left out, as weights of another kind or the state of a training: {', '.join(others)}; copy by hand what "
            "the model needs of it",
            stacklevel=3,
        )


class _OtherFiles:
    """What is beside the weights of a checkpoint.

    Attributes:
        left: Names of what does not belong to the model; grows as files are found.
    """

    def __init__(self, source: Path) -> None:
        self.left: list[str] = []
        self._source, self._model_type = source, _model_type(source / "config.json")
        parts = _json(source / "modules.json")  # of sentence-transformers: what runs after the model
        parts = parts if isinstance(parts, list) else []
        self._modules = {source / part["path"] for part in parts if isinstance(part, dict) and part.get("path")}

    def belonging(self, part: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        """Files of a folder of the checkpoint and of those below it that belong to the model.

        Args:
            part: The folder.
            above: Where those above it really are, so that links end.
        """
        above = (*above, part.resolve())
        for path in sorted(part.iterdir()):
            name = path.relative_to(self._source).as_posix()
            if path.is_dir():
                if path.name.startswith(".") or path.name == "__pycache__" or path.resolve() in above:
                    continue  # what tools keep for themselves, or a link back
                if path not in self._modules and self._is_another_copy(path):
                    self.left.append(f"{name}/")
                else:
                    yield from self.belonging(path, above)
            elif path.is_file() and not (part == self._source and _matches(path.name, _OWN)):
                wrong = (*_WRONG, *_OF_ADAPTERS, *(_WEIGHTS if part == self._source else ()))
                if _matches(path.name, wrong):
                    self.left.append(name)
                else:
                    yield path

    def _is_another_copy(self, folder: Path) -> bool:
        """Whether a folder inside the checkpoint holds the model once more, or a moment of its training."""
        if _matches(folder.name.lower(), _OTHER_COPIES) or (folder / "trainer_state.json").exists():
            return True
        weights = any(_matches(file.name, _WEIGHTS) for file in folder.iterdir())
        return weights and self._model_type is not None and _model_type(folder / "config.json") == self._model_type


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _model_type(config: Path) -> str | None:
    found = _json(config)
    return found.get("model_type") if isinstance(found, dict) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
