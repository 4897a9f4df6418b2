"""A cooldown of the learning rate in annealed steps: a factor over whatever the run's own schedule sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.hooks import PATIENCE
from moe_precision.annealing.schedule import cooldown_factor


class RateCooldown:
    """Lowers the rates of all optimizers for the time of each step, and gives them back afterwards.

    Schedulers, checkpoints and loggers see the rates of the run's own schedule: factors never multiply each other, and
    a resumed run needs no state but its step.

    Args:
        owner: Name of the callback, for messages.
        asked: Whether to do anything.

    Attributes:
        factor: Of the step to come; None where nothing is lowered.
    """

    shape: Callable[[int, int], float] = staticmethod(cooldown_factor)

    def __init__(self, owner: str, asked: bool) -> None:
        self._owner, self._asked = owner, asked
        self.factor: float | None = None
        self._applied = False
        self._schedulers: Sequence[Any] = ()
        self._handles: dict[int, list[Any]] = {}  # id of an optimizer -> its hooks
        self._given: list[tuple[dict[str, Any], Any, Any]] = []  # group, the schedule's rate, the lowered one

    def check(self, total: float, optimizers: Iterable[Any], schedulers: Sequence[Any]) -> None:
        """Before the first step.

        Args:
            total: Steps at the end of the run.
            optimizers: That train the model, as far as they are there.
            schedulers: Of their learning rates.

        Raises:
            AnnealError: Nobody knows when the run ends, or an optimizer cannot be lowered.
        """
        if not self._asked:
            return
        if total == float("inf"):
            raise AnnealError(
                "cooldown=True falls to 0 at the end of the run, and nobody knows when that is: set "
                "Trainer(max_steps=...), or leave it out"
            )
        for optimizer in optimizers:
            _lowerable(optimizer)
        self._schedulers = schedulers

    def begin(self, steps: float) -> None:
        """When annealing begins, or is resumed, with so many steps left."""
        self._applied = False
        if not self._asked:
            return
        rank_zero_info(
            f"{self._owner}: the learning rate that is set is multiplied in each annealed step by a factor that falls "
            "from 1 to 0 as 1 - sqrt; loggers of the rate do not see it, it is anneal/rate_factor"
        )
        if not constant_rate(self._schedulers, int(steps)):
            rank_zero_warn(
                f"{self._owner}: cooldown=True, and the run's own schedule is not known to be constant in the annealed "
                "steps: both lower the rate. Leave the cooldown out where the schedule falls to its end"
            )

    def before_step(self, optimizers: Iterable[Any], done: int, steps: float) -> None:
        """Before an annealed step.

        Args:
            optimizers: That will take it.
            done: Annealed steps before it.
            steps: All annealed steps.

        Raises:
            AnnealError: An optimizer cannot be lowered.
        """
        if not self._asked:
            return
        self.factor = self.shape(done, int(steps))
        for optimizer in map(_lowerable, optimizers):
            if id(optimizer) not in self._handles:
                self._handles[id(optimizer)] = [
                    optimizer.register_step_pre_hook(self._lower),
                    optimizer.register_step_post_hook(self._after_step),
                ]

    def check_used(self, done: int) -> None:
        """After an annealed step, the ``done``-th.

        Raises:
            AnnealError: No step so far was taken at a lowered rate. Gradient scaling may leave out some.
        """
        if self._asked and not self._applied and done >= PATIENCE:
            raise AnnealError(
                f"cooldown=True, and no optimizer has taken a step at a lowered rate in {done} annealed steps: it is "
                "not stepped by its own step(). Leave the cooldown out, and let the schedule lower the rate"
            )

    def metrics(self) -> dict[str, float]:
        """What to log for a step."""
        return {} if self.factor is None else {"anneal/rate_factor": self.factor}

    def close(self) -> None:
        """Takes the hooks off, and gives rates back that an interrupted step has left; a second call does nothing."""
        for handle in (handle for handles in self._handles.values() for handle in handles):
            handle.remove()
        self._handles, self.factor = {}, None
        self._give_back()

    def _lower(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._give_back()  # of a step that was interrupted
        assert self.factor is not None
        tensors: set[int] = set()
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                group["lr"] = rate * self.factor
                self._given.append((group, rate, group["lr"]))
            elif id(rate) not in tensors:  # torch puts one into all groups
                tensors.add(id(rate))
                before = rate.clone()
                rate.mul_(self.factor)  # in place, since captured graphs read it
                self._given.append((group, before, rate.clone()))
        self._applied = True

    def _after_step(self, *_: Any) -> None:
        if self._give_back():
            raise AnnealError(
                "cooldown=True, and the learning rate was changed while the optimizer took a step: training_step steps "
                "a scheduler, or the optimizer sets its own rate. Step the scheduler after the optimizer, or leave the "
                "cooldown out"
            )

    def _give_back(self) -> bool:
        """Gives rates back what the schedule had set, and returns whether somebody has set another, which stays."""
        given, self._given = self._given, []
        changed = False
        for group, rate, lowered in given:
            if bool(group["lr"] != lowered):
                changed = True
            elif isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        return changed


def constant_rate(schedulers: Iterable[Any], steps: int) -> bool:
    """Whether the schedules of a run leave the rates as they are for some steps to come; False where nobody knows.

    Known are runs without schedulers, and those of `LambdaLR`, such as all of transformers'.
    """
    for scheduler in schedulers:
        if not isinstance(scheduler, LambdaLR):
            return False
        points = [scheduler.last_epoch + round(steps * part / 100) for part in range(101)]
        try:
            if any(len({rate(point) for point in points}) > 1 for rate in scheduler.lr_lambdas):
                return False
        except Exception:  # of the user's function, which may know no later steps
            return False
    return True


def _lowerable(optimizer: Any) -> torch.optim.Optimizer:
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer) or any(group.get("lr") is None for group in inner.param_groups):
        raise AnnealError(
            f"cooldown=True lowers the learning rates of torch's optimizers, and {type(inner).__name__} is none, or "
            "sets its own: leave the cooldown out"
        )
    return inner
