"""The callback that ends training on a plan, for transformers' Trainer: the last steps go through its grid."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks.of_trainer import optimizers_of, run_folder, save_state, saved_file, saves_as_float
from moe_precision.callbacks.plan_annealer import PlanAnnealer
from moe_precision.callbacks.restored import NOT_RESTORED
from moe_precision.callbacks.router_norm_trainer_callback import RouterNormTrainerCallback
from moe_precision.callbacks.scale_distiller import refuse_distilling
from moe_precision.callbacks.trainer_experts import save_experts, saved_experts
from moe_precision.layers.module_tree import modes_kept
from moe_precision.layers.moe_layers import MoELayer, find_moe_layers
from moe_precision.present.wandb_media import current_run
from moe_precision.quantize.codec.grid import Grid, GridError
from moe_precision.recording.router_norms import norms_by_layer

_STATE = "annealing.safetensors"
_START = "annealing_start.json"  # of start="auto", before there is a grid


class PrecisionAnnealTrainerCallback(PlanAnnealer, TrainerCallback):
    """Ends ``transformers.Trainer``'s training on a precision plan, as `PrecisionAnneal` does for Lightning.

    From ``start`` on every forward pass uses the quantized expert weights. When training ends the model's weights are
    on the grid: ``trainer.save_model(folder)`` afterwards, and ``moe-precision quantize folder annealed_plan.json out``
    packs exactly the codes that training ended on. The grid is part of every checkpoint, so that
    ``resume_from_checkpoint`` continues with it. With ``report_to="wandb"`` its curves appear beside the Trainer's own;
    the losses of an evaluation, on the grid and off it, take two more forward passes.

    Args:
        recorder: The callback that records router norms, for a ``method`` that reads them.
        settings: As in `PrecisionAnneal`; ``export_to`` is relative to ``output_dir``.

    A run that was interrupted leaves the model on the grid: `close` takes it off.

    Attributes:
        plan: The plan, once it is known.
        grid: The grid, once annealing has begun.

    Raises:
        ValueError: As in `PrecisionAnneal`; or a resumed model is not the checkpoint's.

    Example:
        >>> anneal = PrecisionAnnealTrainerCallback(start=0.9, average_bits=2.0, bits=(1, 2, 3))
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[anneal])
        >>> trainer.train()
        >>> trainer.save_model("checkpoint")
    """

    _recorder = "RouterNormTrainerCallback (recorder=...)"

    def __init__(self, *, recorder: RouterNormTrainerCallback | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._history_of = recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        saves_as_float(model)
        if args.load_best_model_at_end:
            raise AnnealError(
                "load_best_model_at_end brings back weights of an earlier step, not those that ended on the grid: "
                "leave this option out"
            )
        if args.n_gpu > 1:
            raise AnnealError(
                "several GPUs in one process (nn.DataParallel) copy the model in every step: use torchrun"
            )
        if self._history_of is not None:
            refuse_distilling(self._history_of.distill_steps)
        self._prepare(str(run_folder(args)), anew=True)
        if (saved := saved_file(args, state, _STATE)) is not None:
            self.grid = Grid.load(saved)
            self.plan = self.grid.plan
            try:
                self.grid.check_router_norms(self._norms(self._part(model)), f"grid {saved}")
            except GridError as error:
                raise GridError(f"{error} {NOT_RESTORED}") from error
            if others := saved_experts(args, state).others(self._layers(self._part(model))):
                raise GridError(
                    f"the grid {saved} belongs to other weights: {len(others)} expert matrices differ, {others[0]} the "
                    f"first. {NOT_RESTORED}"
                )
            rank_zero_info(f"PrecisionAnnealTrainerCallback: continues with the grid of {saved}")
        if (found := saved_file(args, state, _START)) is not None:
            self._start.load(found)
        history = None if self._history_of is None else self._history_of.history
        schedulers = [kwargs["lr_scheduler"]] if kwargs.get("lr_scheduler") is not None else []
        part = self._part(model)
        self._check(part, state.global_step, state.max_steps, history, optimizers_of(kwargs), schedulers)
        self._start.watch(part)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        optimizers = optimizers_of(kwargs)
        history = None if self._history_of is None else self._history_of.history
        step = state.global_step
        self._before_step(self._part(model), optimizers, history, step, _logs(args, state, step + 1))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._statistics.after_batch(state.global_step)
        self._statistics.before_batch(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._statistics.after_batch(state.global_step)
        self._after_step(state.global_step)
        if _logs(args, state, state.global_step):
            _log(state, self._metrics())

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._hooks is None or current_run() is None or args.world_size > 1:
            return
        from accelerate.utils import send_to_device

        batches = kwargs.get("eval_dataloader")
        with modes_kept(model):
            model.eval()
            for batch in () if batches is None else batches:  # a stream has no length, and so no truth value
                self._losses.add(
                    self._part(model),
                    send_to_device(batch, next(model.parameters()).device),
                    self._hooks,
                    self._taught.teacher,
                )
        _log(state, self._losses.take(self._losses.sums))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._start.found and state.is_world_process_zero:
            save_state(self._start.save, args, state, _START)
        if self.grid is None or self._hooks is None:
            return
        self.grid.router_norms = self._norms(self._part(model))
        if state.is_world_process_zero:
            save_state(self.grid.save, args, state, _STATE)
            save_experts(self._hooks.layers, args, state)

    @torch.no_grad()
    def _norms(self, model: Any) -> dict[str, torch.Tensor]:
        return norms_by_layer(self._layers(model))

    def _layers(self, model: Any) -> list[MoELayer]:
        return find_moe_layers(model, **self._patterns())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._finish(state.is_world_process_zero, state.global_step)
        self._files.raise_error()


def _logs(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether a step is logged: the same on all ranks, since counting codes is a collective."""
    return "wandb" in (args.report_to or []) and step % int(state.logging_steps or 1) == 0


def _log(state: TrainerState, metrics: dict[str, float]) -> None:
    run = current_run()
    if run is not None and metrics and state.is_world_process_zero:
        run.log({**metrics, "train/global_step": state.global_step})
