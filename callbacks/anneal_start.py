"""When annealing begins: at a step, at a share of training, or where the length of the run and the plan say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.schedule import LEAST_SHARE, annealed_share, tokens_of
from moe_precision.layers.module_tree import root_model
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.layers.shape import LayerShape
from moe_precision.plans.notes import AnnealingNote, PlanNotes
from moe_precision.plans.plan import PrecisionPlan
from moe_precision.plans.settings import PlanSettings, expert_weights
from moe_precision.plans.widths import SCALE_AND_OFFSET_BITS
from moe_precision.recording.processes import processes_per_batch, summed

AUTO = "auto"
_COUNTED = 10  # steps whose tokens are counted; fewer in a short run
_FEW = 100  # annealed steps, below which docs/annealing.md advises against it


class AnnealStart:
    """The first annealed step, as it is asked for, or as ``auto`` finds it in the first steps of a run.

    `found` is in the checkpoints and in the plan's notes: once it is known, a resumed run begins where the first one
    would have. One that is resumed before counts its own first steps.

    Args:
        owner: Name of the callback, for messages.
        asked: A share of training below 1, a step, or ``auto``.
        whole: ``auto`` is the whole run: there is a teacher, so that the model is finished already.

    Attributes:
        asked: As it was given.
        found: What ``auto`` has found, for the plan's notes; empty before, and for any other start.
        first: The first annealed step; that of the least share until ``auto`` has found it.
        total: Steps at the end of the run, in the same unit; infinite where nobody knows.

    Raises:
        ValueError: ``asked`` is none of these.
    """

    def __init__(self, owner: str, asked: float | str, whole: bool) -> None:
        if isinstance(asked, str) and asked != AUTO:
            raise ValueError(f"start must be a share of max_steps below 1, a whole step, or 'auto'; got {asked!r}")
        if not isinstance(asked, str) and (not 0 <= asked < float("inf") or (asked >= 1 and asked != int(asked))):
            raise ValueError(f"start must be a share of max_steps below 1 or a whole step, got {asked}")
        self._owner, self.asked, self._whole = owner, asked, whole
        self.found: AnnealingNote = {}
        self.first, self.total = 0, math.inf
        self._tokens = self._from = 0
        self._begun = self._counts = False
        self._watch: RemovableHandle | None = None

    def check(self, total: float, step: int, plan: PrecisionPlan | None) -> None:
        """Before the first step.

        Args:
            total: Steps at the end of the run.
            step: Where training starts.
            plan: That of the run that is resumed, if annealing had begun.

        Raises:
            AnnealError: ``asked`` depends on the number of steps, which nobody knows.
        """
        if total == math.inf and (isinstance(self.asked, str) or self.asked < 1):
            raise AnnealError(
                f"start={self.asked!r} depends on the number of steps, and neither max_steps nor max_epochs with data "
                "of known length says it: set Trainer(max_steps=...), or give the step to begin at"
            )
        self._tokens, self._from, self._begun, self._counts = 0, step, False, False
        if self.asked != AUTO:
            self.found = {}  # of a run that was begun with auto
        elif plan is None and not self.found:
            self._counts = not self._whole
            if self._whole:
                self.found = {"share": 1.0}
                rank_zero_info(
                    f"{self._owner}: start='auto' anneals the whole run, since a teacher is of a finished one"
                )
        self.set(total)
        if plan is not None:
            self._begun, self.first = True, plan.notes.get("annealing", {}).get("start", self.first)

    def set(self, total: float) -> None:
        """Sets where the run ends, and with it where annealing begins, unless it has begun."""
        self.total = total
        if self._begun:
            return
        if isinstance(self.asked, str):
            self.first = max(0, int(total) - max(1, round(self.found.get("share", LEAST_SHARE) * total)))
        else:
            self.first = int(self.asked * total) if self.asked < 1 else int(self.asked)

    def see(self, batch: Any) -> None:
        """Before a batch of training is run."""
        if self._counts:
            self._tokens += tokens_of(batch)

    def watch(self, model: nn.Module) -> None:
        """Sees the batches that a transformers model is called with, where a Trainer does not show them.

        A model that torch.compile has compiled is not watched.
        """
        if self._counts:
            self._watch = root_model(model).register_forward_pre_hook(self._watched, with_kwargs=True)

    def close(self) -> None:
        """Ends `watch`; a second call does nothing."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    def _watched(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.see(kwargs or args)

    def is_due(self, step: int) -> bool:
        """Whether ``auto`` has seen enough of the run, after so many steps, to say where annealing begins."""
        return self._counts and step - self._from >= min(_COUNTED, max(1, self.total // 20))

    def find(self, model: nn.Module, layers: list[MoELayer], step: int, plan: PrecisionPlan | PlanSettings) -> None:
        """Finds where annealing begins; a collective.

        Args:
            model: The model, which shows how many processes run each batch together.
            layers: Its layers.
            step: Steps taken.
            plan: The plan, or what will be asked of it.
        """
        shapes = {layer.name: layer.shape for layer in layers}
        stored = stored_bits_asked(plan, shapes) if isinstance(plan, PlanSettings) else plan.stored_bits
        self._counts = False
        self.close()
        counted = torch.tensor(self._tokens, device=next(model.parameters()).device)
        tokens = int(summed(counted)) / processes_per_batch(model) / (step - self._from) * self.total
        size = tokens / (expert_weights(shapes.values()) * stored / 8)
        share = annealed_share(size)
        self.found = {"share": round(share, 4)}
        if not tokens:
            why = "the batches do not show how many tokens they have, so it is the least share"
        else:
            self.found["tokens_per_byte"] = float(f"{size:.4g}")
            why = (
                f"{tokens:,.0f} tokens in this run are {size:,.3g} per byte of the experts at {stored:.3g} stored "
                "bits (those of a training before it are not counted: start=0 anneals a finished model all the way)"
            )
        self.set(self.total)
        steps = int(self.total) - self.first
        where = f"step {self.first:,} of {int(self.total):,}, the last {share:.0%}"
        rank_zero_info(f"{self._owner}: start='auto' is {where}: {why}")
        if steps < _FEW:
            rank_zero_warn(
                f"{self._owner}: {steps} annealed steps are few: below {_FEW} quantizing the finished "
                "model with statistics and distilled scales is as good, and takes none (docs/annealing.md)"
            )

    def restore(self, found: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint holds of `found`."""
        known = {key: float(found[key]) for key in ("share", "tokens_per_byte") if key in found}
        self.found = cast(AnnealingNote, known)

    def save(self, path: Path) -> None:
        """Writes `found` as JSON, for a Trainer whose checkpoints are folders."""
        path.write_text(json.dumps(self.found), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Takes over what `save` wrote.

        Raises:
            AnnealError: It is damaged.
        """
        try:
            self.restore(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise AnnealError(f"{str(path)!r} is damaged: {error}. Without it, the start is found anew") from error

    def begin(self, plan: PrecisionPlan, step: int, teacher: str | None) -> PrecisionPlan:
        """When annealing begins: the plan with a note of it, from which a resumed run has what it needs.

        Args:
            plan: What is annealed.
            step: The first annealed step.
            teacher: What identifies the teacher, if there is one.
        """
        self._begun, self._counts, self.first = True, False, step
        note: AnnealingNote = {"start": step, **self.found}
        if self.total < math.inf:
            note["steps"] = int(self.total) - step
        if teacher is not None:
            note["teacher"] = teacher
        return replace(plan, notes=cast(PlanNotes, {**plan.notes, "annealing": note}))


def stored_bits_asked(settings: PlanSettings, shapes: Mapping[str, LayerShape]) -> float:
    """Bits per expert weight in the file, scales and offsets included, of a plan that is not made yet.

    Args:
        settings: What is asked of it.
        shapes: Layer name -> shape.
    """
    stored = settings.stored_budget(shapes)
    return settings.nominal_bits(shapes) + SCALE_AND_OFFSET_BITS / settings.group_size if stored is None else stored
