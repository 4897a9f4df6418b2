"""The teacher of annealed steps in a training run: checked before it, in its place while experts are on the grid."""

from __future__ import annotations

import os

from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from moe_precision.annealing.hooks import GridHooks
from moe_precision.annealing.teacher import Teacher, teacher_weights


class TaughtSteps:
    """Reads the teacher before training, and gives it to the model once annealing has begun.

    Args:
        owner: Name of the callback, for messages.
        checkpoint: The teacher's; None for no teacher.
        weight: Share of the cross-entropy that it takes the place of.

    Attributes:
        teacher: Once annealing has begun, if there is one.

    Raises:
        ValueError: ``weight`` is not above 0 and at most 1.
    """

    def __init__(self, owner: str, checkpoint: str | os.PathLike[str] | None, weight: float) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"teacher_weight must be above 0 and at most 1, got {weight}: teacher=None leaves it out")
        self._owner, self._checkpoint, self._weight = owner, checkpoint, weight
        self._weights: dict[str, Tensor] = {}
        self._used = False
        self.teacher: Teacher | None = None

    def check(self, model: nn.Module) -> None:
        """Before the first step: reads the teacher's weights.

        Raises:
            AnnealError: The teacher is not of the model that is trained.
            CheckpointError: Its folder is missing or damaged.
        """
        self.close()
        if self._checkpoint is not None:
            self._weights = teacher_weights(self._checkpoint, model)

    def begin(self, model: nn.Module, hooks: GridHooks) -> None:
        """Once the experts are on the grid."""
        if self._weights:
            self.teacher, self._weights, self._used = Teacher(model, self._weights, self._weight, hooks), {}, False
            rank_zero_info(
                f"{self._owner}: {str(self._checkpoint)!r} is the teacher, with {self._weight:g} of the loss of the "
                "labels; it takes the memory of its weights, and one more forward pass per batch"
            )

    def before_step(self, logged: bool) -> None:
        """Before a forward pass, of a step that will be logged or not."""
        if self.teacher is not None:
            self.teacher.measures = logged

    def after_step(self) -> None:
        """After an annealed step.

        Raises:
            AnnealError: It was the first one, and the model has learned nothing from its teacher.
        """
        if self.teacher is not None and not self._used:
            self.teacher.check_used()
            self._used = True

    def metrics(self) -> dict[str, float]:
        """What to log for a step."""
        if self.teacher is None or self.teacher.kl is None:
            return {}
        return {"anneal/kl": float(self.teacher.kl)}

    def close(self) -> None:
        """Takes the teacher away; a second call does nothing."""
        if self.teacher is not None:
            self.teacher.close()
        self.teacher, self._weights = None, {}
