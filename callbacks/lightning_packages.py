"""One base class for callbacks of both packages that hold Lightning's Trainer: `pytorch_lightning` and `lightning`.

Each has classes of its own with the same names, so that neither knows the other's by ``isinstance``. Nothing else here
depends on which of them a Trainer is from.
"""

from __future__ import annotations

import math
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytorch_lightning
from pytorch_lightning.utilities.rank_zero import rank_zero_module
from torch.optim.swa_utils import AveragedModel

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def _bases() -> list[type]:
    """The Callback of each package that is installed."""
    found: list[type] = [pytorch_lightning.Callback]
    if find_spec("lightning") is not None:
        log = rank_zero_module.log  # the import takes over what both packages say
        with suppress(ImportError, AttributeError):  # another package of that name, or one that does not fit torch
            found.append(import_module("lightning.pytorch").Callback)
        rank_zero_module.log = log
    return found


if TYPE_CHECKING:

    class LightningCallback(pytorch_lightning.Callback):
        """A Callback of both packages."""
else:

    class LightningCallback(*_bases()):
        """A Callback of `pytorch_lightning` and, where it is installed, of `lightning.pytorch`."""


def is_called(instance: Any, *names: str) -> bool:
    """Whether an object's class, or one that it inherits from, has one of these names, in whichever package."""
    return any(one.__name__ in names for one in type(instance).__mro__)


def averages_weights(callback: Any) -> bool:
    """Whether a callback trains on some weights and leaves their average.

    Known are Lightning's own, and, once training starts, any that keeps one of torch's averaged models.
    """
    return is_called(callback, *_AVERAGING) or any(isinstance(one, AveragedModel) for one in vars(callback).values())


def total_steps(trainer: pytorch_lightning.Trainer, pl_module: pytorch_lightning.LightningModule) -> float:
    """Steps at the end of the run in the unit of ``trainer.global_step``; infinite where nobody can know.

    ``estimated_stepping_batches`` counts batches, and ``global_step`` counts the steps of every optimizer; nor does it
    know of accumulation that changes between epochs. A module
    that steps its optimizers itself may take any number in a batch: what it has taken so far is extrapolated, and
    before the first batch one step of each optimizer is assumed.
    """
    most = trainer.max_steps if trainer.max_steps != -1 else float("inf")
    estimated = trainer.estimated_stepping_batches  # which loads the data
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs in (None, -1) or batches == float("inf"):
        return most
    if not pl_module.automatic_optimization:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        seen = progress.total.processed
        each = trainer.global_step / seen if seen and trainer.global_step else len(trainer.optimizers)
        return min(batches * epochs * each, most)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_called(callback, "GradientAccumulationScheduler"):
            counts = (callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs))
            steps: int = sum(math.ceil(batches / count) for count in counts)
            return min(steps, most)
    return estimated
