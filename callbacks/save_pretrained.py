"""A Lightning callback that leaves a transformers checkpoint: what the quantize step and `from_pretrained` read."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_precision.callbacks.late_finish import in_flat_shards, is_finished, why_not_late
from moe_precision.callbacks.lightning_packages import LightningCallback
from moe_precision.callbacks.trained_part import submodule
from moe_precision.checkpoints.config import config_of
from moe_precision.checkpoints.dtypes import DTYPES, cast
from moe_precision.checkpoints.folders import check_replaceable, folder_replaced_when_done
from moe_precision.checkpoints.tokenizer import load_tokenizer
from moe_precision.compat import was_dequantized_on_loading
from moe_precision.files import check_writable
from moe_precision.layers.module_tree import root_model
from moe_precision.layers.roots import is_trained, transformers_models


class SavePretrained(LightningCallback):
    """Writes the transformers model of a LightningModule, and its tokenizer, when training ends.

    The tokenizer is what `evaluate`, `compare` and `--statistics-batches` read text with; a warning says when none is
    saved.

    A model that was quantized as it was published and became float on loading (gpt-oss, block-wise FP8) is written as a
    float one, under the names of its module tree.

    Args:
        dirpath: Folder of the checkpoint, relative to the Trainer's ``default_root_dir``.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to save in, or None to keep the training dtype. Tensors that the
            model's family keeps in float32 stay in it. A model whose experts are packed is saved as it is.
        tokenizer: A tokenizer, or the folder or name of one. None takes the attribute ``tokenizer`` of the data module,
            else of the LightningModule.
        module: Path of the model in the LightningModule, such as ``student``; None takes the only one that is trained.

    Raises:
        CheckpointError: ``tokenizer`` names none, or an empty one.
        ValueError: An unknown dtype; when training starts, if the LightningModule holds no transformers model, several
            that are trained, one with PEFT adapters, or one in flat shards (FSDP1, DeepSpeed ZeRO-3); if another
            callback of the run writes into the folder.
        OSError: In ``setup``, if the folder cannot be written to, or holds something other than a checkpoint.
    """

    def __init__(
        self,
        dirpath: str = "checkpoint",
        dtype: str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        module: str | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
        self.dirpath, self.dtype, self.module = dirpath, dtype, module
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
        if self.tokenizer is not None and not hasattr(self.tokenizer, "save_pretrained"):
            raise ValueError(f"tokenizer must be a transformers tokenizer, or its folder or name, got {tokenizer!r}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_folder(trainer, Path(trainer.default_root_dir, self.dirpath))

    _started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model(pl_module)
        if in_flat_shards(trainer.strategy.model or pl_module):
            raise ValueError(
                "SavePretrained cannot put together the shards of FSDP1 or DeepSpeed ZeRO-3: train with FSDP2 "
                "(ModelParallelStrategy) or ZeRO-2, or leave it out and convert the Trainer's checkpoint"
            )
        self._started = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        model = self._model(pl_module)
        # Whole tensors on the CPU of rank 0, under every strategy; a collective, so on all ranks.
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            self._write(trainer, model, state)
        trainer.strategy.barrier("SavePretrained.on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started, self._started = self._started, False
        missing = not Path(trainer.default_root_dir, self.dirpath, "config.json").exists()
        if started or not missing or trainer.fast_dev_run or not is_finished(trainer):  # type: ignore[attr-defined]
            return
        if reason := why_not_late(trainer, pl_module):
            rank_zero_warn(f"SavePretrained: training had ended before this start, and nothing is saved: {reason}")
        else:
            self.on_train_end(trainer, pl_module)

    def _check_folder(self, trainer: Trainer, folder: Path) -> None:
        check_writable(folder / "config.json")
        check_replaceable(folder)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            place = getattr(other, "export_to", None) or getattr(other, "dirpath", None)
            # What is ours is relative to the run, Lightning's own to the working directory.
            known = Path(trainer.default_root_dir if isinstance(other, LightningCallback) else "", str(place or folder))
            if place and other is not self and known.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"SavePretrained replaces the folder {str(folder)!r} at the end, and {type(other).__name__} writes "
                    f"into it ({str(place)!r}): give one of them a folder of its own"
                )

    def _model(self, pl_module: LightningModule) -> PreTrainedModel:
        """What is saved; raises if there is no such model, or one that cannot be saved."""
        model = root_model(pl_module if self.module is None else submodule(pl_module, self.module))
        if not isinstance(model, PreTrainedModel):
            models = [path for path, one in transformers_models(pl_module).items() if is_trained(one)]
            if len(models) > 1:
                raise ValueError(
                    f"SavePretrained: {type(pl_module).__name__} trains {len(models)} transformers models, "
                    f"{', '.join(models)}: freeze the others (requires_grad_(False)), or name one, as in "
                    f"SavePretrained(module={models[0]!r})"
                )
            raise ValueError(f"SavePretrained found no transformers model in {type(pl_module).__name__}")
        if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in model.modules()):
            raise ValueError(
                "SavePretrained: the model holds PEFT adapters, whose names are not those of the base model: leave "
                "SavePretrained out. After training, merge them (model.merge_and_unload()), call save_pretrained, and "
                "quantize that checkpoint"
            )
        return model

    def _write(self, trainer: Trainer, model: PreTrainedModel, state: dict[str, Any]) -> None:
        packed = getattr(model, "is_quantized", False)  # whose scales have a dtype of their own
        dtype = model.dtype if self.dtype is None or packed else DTYPES[self.dtype]
        if self.dtype is not None and not packed:
            state = cast(model, state, dtype)
        folder = _free(Path(trainer.default_root_dir, self.dirpath))
        tokenizer = self._tokenizer(trainer)
        with folder_replaced_when_done(folder) as temporary:
            # weights that were unpacked on loading (gpt-oss, block-fp8) have no way back into that form
            model.save_pretrained(
                temporary, state_dict=state, save_original_format=not was_dequantized_on_loading(model)
            )
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


def _free(folder: Path) -> Path:
    """The folder, or another beside it if something that is no checkpoint has come into it during training."""
    try:
        check_replaceable(folder)
    except FileExistsError as error:
        names = (folder.with_name(f"{folder.name}-{number}") for number in count(1))
        spare = next(name for name in names if not name.exists())
        rank_zero_warn(f"SavePretrained: {error}. The model is saved in {str(spare)!r}")
        return spare
    return folder
