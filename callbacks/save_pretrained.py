"""A Lightning callback that leaves a transformers checkpoint: what the quantize step and `from_pretrained` read."""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from transformers import AutoConfig, PreTrainedModel

from moe_precision.files import check_writable, folder_replaced_when_done
from moe_precision.moe_layers import root_model

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SavePretrained(Callback):
    """Writes the transformers model of a LightningModule, and the data module's tokenizer, when training ends.

    Args:
        dirpath: Folder of the checkpoint, relative to the Trainer's ``default_root_dir``.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to save in, or None to keep the training dtype.

    Raises:
        ValueError: An unknown dtype, or the LightningModule holds no transformers model.
        OSError: In ``setup``, if the folder cannot be written to.
    """

    def __init__(self, dirpath: str = "checkpoint", dtype: str | None = None) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} or None, got {dtype!r}")
        self.dirpath, self.dtype = dirpath, dtype

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(Path(trainer.default_root_dir, self.dirpath, "config.json"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = root_model(pl_module)
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"SavePretrained found no transformers model in {type(pl_module).__name__}")
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir, self.dirpath)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        with folder_replaced_when_done(folder) as temporary:
            if self.dtype is None:
                model.save_pretrained(temporary)
            else:
                dtype = _DTYPES[self.dtype]
                state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
                model.save_pretrained(temporary, state_dict=state)
                config = AutoConfig.from_pretrained(temporary)
                config.dtype = dtype  # save_pretrained wrote the dtype of the live model
                config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        rank_zero_info(f"SavePretrained: wrote {folder}")
