"""The teacher of annealed steps in a training run: checked before it, in its place while experts are on the grid."""

from __future__ import annotations

from contextlib import suppress

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.hooks import GridHooks
from moe_precision.annealing.teacher import Teacher, dismiss_left, taught
from moe_precision.annealing.teacher_weights import (
    digest_of,
    load_teacher,
    save_teacher,
    teacher_weights,
    weights_now,
)
from moe_precision.callbacks.run_files import RunFiles
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.processes import is_first

START = "start"


class TaughtSteps:
    """Reads or keeps the teacher, and gives it to the model once annealing has begun.

    The model as it is when annealing begins is in no checkpoint: it is kept in a file beside the plan, from which a
    resumed run reads it, until the plan is written.

    Args:
        owner: Name of the callback, for messages.
        teacher: ``start`` for the model as it is when annealing begins, or a float checkpoint; None for no teacher.
        weight: Share of the cross-entropy that it takes the place of.

    Attributes:
        teacher: Once annealing has begun, if there is one.
        digest: What identifies its weights, once they are known; it goes into the plan's notes.

    Raises:
        ValueError: ``weight`` is not above 0 and at most 1.
    """

    def __init__(self, owner: str, teacher: str | None, weight: float) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"teacher_weight must be above 0 and at most 1, got {weight}: teacher=None leaves it out")
        self._owner, self._asked, self._weight = owner, teacher, weight
        self._weights: dict[str, Tensor] = {}
        self.teacher: Teacher | None = None
        self.digest: str | None = None

    def check(self, model: nn.Module, grid: Grid | None, files: RunFiles) -> None:
        """Before the first step: reads the teacher's weights, if there are any yet.

        Args:
            model: The model, or what is around it.
            grid: Of the run that is resumed, if annealing had begun.
            files: Of this run.

        Raises:
            AnnealError: The teacher is not of the model that is trained, or not of the run that is resumed.
            CheckpointError: Its folder is missing or damaged.
        """
        self.close()
        dismiss_left(model)
        self.digest = None
        if self._asked is not None:
            taught(model)
            if self._asked != START:
                self._weights = teacher_weights(self._asked, model)
            elif grid is not None:
                self._weights = load_teacher(files.paths.teacher, model, grid)
            self.digest = digest_of(self._weights) if self._weights else None
        note = {} if grid is None else grid.plan.notes.get("annealing", {})
        if "start" in note and note.get("teacher") != self.digest:  # a run of an earlier release has no note
            had = "a teacher of other weights" if "teacher" in note else "no teacher"
            raise AnnealError(
                f"teacher={self._asked!r}, and the run that is resumed has learned from "
                f"{had if self.digest else 'a teacher'}: resume with what it had, or from a checkpoint of before "
                "annealing began"
            )

    def take(self, model: nn.Module) -> None:
        """When annealing begins, before weights are moved: keeps the model as it is; a collective under FSDP2."""
        if self._asked == START:
            self._weights = weights_now(model)
            self.digest = digest_of(self._weights)

    def keep(self, grid: Grid, files: RunFiles) -> None:
        """Writes what was taken, for a run that is resumed; this one does without where a disk is full."""
        if self._asked == START and files.written and is_first():
            path = files.paths.teacher
            try:
                save_teacher(path, self._weights, grid)
            except OSError as error:
                rank_zero_warn(
                    f"{self._owner} could not write {str(path)!r}: {error.strerror or error}. This run has its teacher "
                    "all the same. To resume it, give a checkpoint of the model as it is now as the teacher"
                )

    def begin(self, model: nn.Module, hooks: GridHooks) -> None:
        """Once the experts are on the grid."""
        if self._asked is not None:
            self.teacher, self._weights = Teacher(model, self._weights, self._weight, hooks), {}
            what = "the model as it was when annealing began" if self._asked == START else repr(self._asked)
            rank_zero_info(
                f"{self._owner}: {what} is the teacher, in the place of {self._weight:g} of the labels' loss; it takes "
                "the memory of its weights, and one more forward pass per batch"
            )

    def before_step(self, logged: bool) -> None:
        """Before a forward pass, of a step that will be logged or not."""
        if self.teacher is not None:
            self.teacher.measures = logged

    def after_step(self) -> None:
        """After an annealed step.

        Raises:
            AnnealError: The model has learned nothing from its teacher.
        """
        if self.teacher is not None:
            self.teacher.check_used()

    def metrics(self) -> dict[str, float]:
        """What to log for a step."""
        if self.teacher is None or self.teacher.kl is None:
            return {}
        return {"anneal/kl": float(self.teacher.kl)}

    def remove(self, files: RunFiles) -> None:
        """Once the plan is written: removes what a resumed run would have read."""
        if self._asked == START:
            with suppress(OSError):  # a file that is left takes room, and nothing else
                files.paths.teacher.unlink(missing_ok=True)

    def close(self) -> None:
        """Takes the teacher away; a second call does nothing."""
        if self.teacher is not None:
            self.teacher.close()
        self.teacher, self._weights = None, {}
