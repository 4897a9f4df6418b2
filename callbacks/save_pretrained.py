"""A Lightning callback that leaves a transformers checkpoint: what the quantize step and `from_pretrained` read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_precision.checkpoints.config import config_of
from moe_precision.checkpoints.folders import folder_replaced_when_done
from moe_precision.checkpoints.tokenizer import load_tokenizer
from moe_precision.files import check_writable
from moe_precision.layers.module_tree import root_model

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SavePretrained(Callback):
    """Writes the transformers model of a LightningModule, and its tokenizer, when training ends.

    The tokenizer is what `evaluate`, `compare` and `--statistics-batches` read text with; a warning says when none is
    saved.

    Args:
        dirpath: Folder of the checkpoint, relative to the Trainer's ``default_root_dir``.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to save in, or None to keep the training dtype. A model whose
            experts are packed is saved as it is.
        tokenizer: A tokenizer, or the folder or name of one. None takes the attribute ``tokenizer`` of the data module,
            else of the LightningModule.

    Raises:
        CheckpointError: ``tokenizer`` names none, or an empty one.
        ValueError: An unknown dtype, or the LightningModule holds no transformers model, or one with PEFT adapters.
        OSError: In ``setup``, if the folder cannot be written to.
    """

    def __init__(
        self,
        dirpath: str = "checkpoint",
        dtype: str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} or None, got {dtype!r}")
        self.dirpath, self.dtype = dirpath, dtype
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
        if self.tokenizer is not None and not hasattr(self.tokenizer, "save_pretrained"):
            raise ValueError(f"tokenizer must be a transformers tokenizer, or its folder or name, got {tokenizer!r}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(Path(trainer.default_root_dir, self.dirpath, "config.json"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = root_model(pl_module)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"SavePretrained found no transformers model in {type(pl_module).__name__}")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in model.modules()):
            raise ValueError(
                "SavePretrained: the model holds PEFT adapters, whose names are not those of the base model. Merge "
                "them (model.merge_and_unload()) and call save_pretrained, then quantize that checkpoint"
            )
        # Whole tensors on the CPU of rank 0, under every strategy; a collective, so on all ranks.
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            self._write(trainer, model, state)
        trainer.strategy.barrier("SavePretrained.on_train_end")

    def _write(self, trainer: Trainer, model: PreTrainedModel, state: dict[str, Any]) -> None:
        packed = getattr(model, "is_quantized", False)  # whose scales have a dtype of their own
        dtype = model.dtype if self.dtype is None or packed else _DTYPES[self.dtype]
        if self.dtype is not None and not packed:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        folder = Path(trainer.default_root_dir, self.dirpath)
        tokenizer = self._tokenizer(trainer)
        with folder_replaced_when_done(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            config = config_of(temporary)
            config.dtype = dtype  # save_pretrained wrote the dtype of the live model
            config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        rank_zero_info(f"SavePretrained: wrote {folder}")
        if tokenizer is None:
            rank_zero_warn(
                f"SavePretrained: {folder} holds no tokenizer, because neither the data module nor the LightningModule "
                "has one to save as `tokenizer`. `evaluate`, `compare` and `--statistics-batches` need it: give "
                "SavePretrained(tokenizer=...), or call tokenizer.save_pretrained on that folder"
            )

    def _tokenizer(self, trainer: Trainer) -> Any:
        """What was given, else what the data module or the LightningModule has that can be saved; None if nothing."""
        owners = getattr(trainer, "datamodule", None), trainer.lightning_module
        for found in (self.tokenizer, *(getattr(owner, "tokenizer", None) for owner in owners)):
            if hasattr(found, "save_pretrained"):
                return found
        return None
