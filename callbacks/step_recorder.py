"""Recording in trainers that are neither Lightning's nor transformers': they say when a run begins, steps and ends.

The callbacks for OLMo-core, Megatron-Bridge and torchtitan are a few lines over this.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from moe_precision.callbacks.plan_recorder import PlanRecorder
from moe_precision.recording.expert_samples import ExpertSamples
from moe_precision.recording.processes import is_first

_NO_BATCHES = "cannot be done here: this trainer gives a callback no batches to run again"


class StepRecorder(PlanRecorder):
    """Keywords are those of `RouterNormMonitor`, without those that take batches after the last step.

    All methods are called on all processes; process 0 writes.

    Args:
        every_n_steps: Optimizer steps between records; None for 10.
        settings: As in `RouterNormMonitor`.

    Raises:
        ValueError: ``curvature_batches``, ``statistics_batches``, ``statistics_from`` or ``distill_steps`` is given.
    """

    def __init__(self, *, every_n_steps: int | None = None, **settings: Any) -> None:
        for name in ("curvature_batches", "statistics_batches", "statistics_from", "distill_steps"):
            if settings.get(name):
                raise ValueError(f"{name}={settings[name]} {_NO_BATCHES}. Take it from the checkpoint afterwards")
        super().__init__(every_n_steps=every_n_steps or 10, statistics_batches=0, **settings)
        self._resumed: dict[str, Any] = {}

    def begin(self, model: nn.Module, optimizers: Sequence[Any], step: int, folder: str) -> None:
        """Before the first step of this process: finds the layers and takes the baseline.

        Args:
            model: The model, all of its layers.
            optimizers: That train it.
            step: Steps taken so far; above 0 in a resumed run.
            folder: What ``export_to`` is relative to.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._prepare(folder, anew=True)
        if self._resumed:
            self.history.load_state_dict(self._resumed["history"])
            self._experts = ExpertSamples(self._resumed["experts"])
        self._start(model, step, optimizers=optimizers, obstacle=_NO_BATCHES)

    def after_step(self, step: int) -> None:
        """After an optimizer step, the ``step``-th of the run."""
        self._loads.check_seen(self.settings.method)
        if self._layers and self._due(step, 10):
            self._record(step)

    def end(self, step: int, optimizers: Sequence[Any]) -> None:
        """After the last step: takes the last record and writes history, curvature and plan.

        Raises:
            OSError: A file could not be written.
        """
        if not self._layers:
            rank_zero_warn(f"{type(self).__name__}: no plan is written, because no step was taken.")
            return
        self._record_final(step)
        self._finish(is_first(), optimizers)
        self._files.raise_error()

    def fail(self) -> None:
        """After an exception: keeps what was recorded, without any collective."""
        self._loads.stop()
        if is_first():
            self._save_history()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: one blob of bytes, which no checkpointer takes apart."""
        buffer = io.BytesIO()
        if self._layers:
            self._loads.count()  # checkpoints are made on all processes
            experts = ExpertSamples.of(self._layers).state_dict()
            torch.save({"history": self.history.state_dict(), "experts": experts}, buffer)
        return {"router_norms": buffer.getvalue()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, before `begin`; an empty one is that of a run that had not begun."""
        blob = state_dict.get("router_norms", b"")
        self._resumed = torch.load(io.BytesIO(blob), weights_only=True) if blob else {}


def base_class(module: str, name: str = "Callback") -> type:
    """The base class of a trainer; `object` where it is not installed, since its contract is all that is used."""
    try:
        found: type = getattr(import_module(module), name)
    except ImportError:
        return object
    return found


def check_whole(parts: int, what: str) -> None:
    """Raises `ValueError` where a process holds a part of every layer, or of all layers, as plain tensors.

    Args:
        parts: Over how many processes they are split.
        what: How, for the message.
    """
    if parts > 1:
        raise ValueError(
            f"the model is split over {parts} processes ({what}): a plan is of whole experts in all layers, and no "
            "process has them. Record without it, or make the plan from checkpoints: moe-precision plan --final"
        )
