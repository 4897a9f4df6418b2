"""A model's names and shapes from its config.json alone: no weight is read, downloaded or allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from ..compat import model_of_config
from .config import config_of
from .headers import DTYPES as _DTYPES
from .headers import CheckpointError, header
from .hub import is_hub_name, local_folder

ASSUMED_DTYPE = torch.bfloat16  # in which nearly all models are published


def model_of(source: str | os.PathLike[str]) -> PreTrainedModel:
    """The float model of a config.json, or of the folder that holds one, on the meta device.

    A model on the Hub will do by its name if its config is in the cache of this machine.

    A model that its publisher has quantized (FP8, MXFP4) is laid out as if it were not. Its dtype is `stated_dtype`,
    else `ASSUMED_DTYPE`.

    Raises:
        CheckpointError: There is no config.json, or transformers lacks its model.
    """
    path, config = _read(source)
    config.dtype = _stated(path, config)
    return model_of_float_config(config, str(path))


def stated_dtype(source: str | os.PathLike[str]) -> torch.dtype | None:
    """The dtype that a config.json names, else that of the first floating tensor beside it; None if neither is there.

    Raises:
        CheckpointError: As in `model_of`, or a weight file is damaged.
    """
    return _stated(*_read(source))


def _stated(path: Path, config: PreTrainedConfig) -> torch.dtype | None:
    files = [] if config.dtype is not None else sorted(path.parent.glob("*.safetensors"))
    found = (_DTYPES.get(tensor.dtype) for file in files for tensor in header(file).values())
    return config.dtype or next(filter(None, found), None)


def _read(source: str | os.PathLike[str]) -> tuple[Path, PreTrainedConfig]:
    """The path of a config.json, and the config."""
    path = local_folder(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        name = os.fspath(source) if is_hub_name(source) else "NAME"
        raise CheckpointError(
            f"{os.fspath(source)!r} is neither a config.json nor a folder that holds one; of a model on the Hub, "
            f"download that file alone: hf download {name} config.json --local-dir FOLDER"
        )
    try:
        return path, config_of(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{str(path)!r} is not a config of transformers {transformers.__version__}: {reason[0]}"
        ) from error


def model_of_float_config(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """The float model of a config, on the meta device; the config is changed.

    Args:
        config: Any config of transformers.
        name: Where it is from, for messages.

    Raises:
        CheckpointError: transformers has no model for it.
    """
    architecture = next(iter(config.architectures or []), "")
    model_class = getattr(transformers, architecture, None) if architecture else None
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if model_class is None and not architecture:
            model_class = mapping.get(type(config), None)
    if model_class is None:
        raise CheckpointError(
            f"{name!r} names the architecture {architecture!r}, which transformers lacks"
            if architecture
            else f"{name!r} names no architecture, and transformers has no language model for {config.model_type!r}"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = config.dtype or ASSUMED_DTYPE
    with torch.device("meta"):
        return model_of_config(model_class, config)
