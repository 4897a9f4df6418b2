"""Runs that had taken their last step when they were stopped, and are resumed for the files of their end alone.

Lightning then calls neither ``on_train_start`` nor ``on_train_end``, only ``on_fit_end``, when the strategy has let go
of the model already.
"""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from moe_precision.callbacks.lightning_packages import averages_weights
from moe_precision.compat import is_zero3_parameter


def is_finished(trainer: Trainer) -> bool:
    """Whether a ``fit`` has resumed from a checkpoint at which nothing was left to do; asked in ``on_fit_end``."""
    return trainer.ckpt_path is not None and trainer.global_step > 0


def in_flat_shards(module: nn.Module) -> bool:
    """Whether parameters are shards that only the strategy can put together: FSDP1's and DeepSpeed ZeRO-3's."""
    fsdp = any(isinstance(one, FullyShardedDataParallel) for one in module.modules())
    return fsdp or any(is_zero3_parameter(parameter) for parameter in module.parameters())


def why_not_late(trainer: Trainer, pl_module: LightningModule) -> str:
    """Why what belongs to the end cannot be done now; empty if it can."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if averages_weights(callback):
            return f"{type(callback).__name__} has not put the averaged weights in place, which it does at the end"
    if in_flat_shards(pl_module) or any(isinstance(one, DTensor) for one in pl_module.parameters()):
        return (
            "the weights are sharded, and cannot be read after training. Run `moe-precision plan HISTORY --final "
            "CHECKPOINT` on the history that is beside the plan"
        )
    return ""
