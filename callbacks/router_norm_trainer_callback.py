"""The callback that records router norms for transformers' Trainer, and writes a precision plan when training ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_precision.callbacks.of_trainer import optimizers_of, run_folder, save_state, saved_file, saves_as_float
from moe_precision.callbacks.plan_recorder import PlanRecorder
from moe_precision.callbacks.statistics_recorder import Again
from moe_precision.callbacks.trainer_experts import save_experts, saved_experts, warn_unless_best
from moe_precision.present.wandb_media import current_run
from moe_precision.recording.history import RouterNormHistory

_STATE = "router_norms.safetensors"


class RouterNormTrainerCallback(PlanRecorder, TrainerCallback):
    """Records the L2 norm of each expert's router weights under ``transformers.Trainer`` and exports a precision plan.

    Works as `RouterNormMonitor` does for Lightning, and gives equal histories and plans for equal weights. A record is
    taken with every checkpoint and written into its folder, so ``resume_from_checkpoint`` continues with the original
    baseline, and a run whose routers or experts were not restored stops with an error. If ``load_best_model_at_end``
    leaves the experts out, a warning says what to reload. In a ``hyperparameter_search`` every trial has its own plan,
    in the folder of its checkpoints. With ``report_to="wandb"`` the curves appear beside the Trainer's own, over
    ``train/global_step``; for other trackers, which a callback cannot reach, see `log_to`.

    Args:
        method: How widths are chosen. ``router_norm`` is the paper's rule; ``curvature`` minimizes the
            predicted increase of the loss. ``moe-precision plan --help`` lists all of them.
        average_bits: Budget in nominal bits per expert weight; 2.5 if no budget is given.
        stored_bits: Budget with scales and offsets included, instead of ``average_bits``.
        expert_gib: Budget as the size of all routed experts in the file, in GiB, instead of ``average_bits``.
        total_gib: Budget as the size of the whole model in the file, in GiB, instead of ``average_bits``.
        rest_gib: What everything but the routed experts takes, for ``total_gib``; None for what the model has.
        bits: Levels to choose from, of 1 to 8, or 16: one, two, or three that are equally spaced; any number for a
            method that knows costs (``curvature``, ``weight_error``).
        group_size: Weights that share a scale and an offset when the plan is carried out; divides every expert's input
            width.
        granularity: What shares a width: ``expert``; for methods that know costs also ``expert+projection``, ``layer``
            or ``layer+projection``.
        seed: For ``method="random"`` and ``"shuffled_curvature"``.
        zeta: Factor of the paper's reorder rule.
        max_dropped: Largest share of a layer's experts that may be dropped, where ``bits`` has 0.
        min_tokens: Tokens of the statistics below which an expert is not dropped.
        router_pattern: Regular expression that names the routers' weights, for models whose routers cannot be found by
            structure; see `find_moe_layers`.
        expert_pattern: Regular expression that names the experts' weights.
        layout: Instead of patterns, the framework whose layout the model has, such as ``megatron``.
        module: Path of the model to record in what the Trainer trains, such as ``student``; None takes the only one
            that is trained.
        every_n_steps: Optimizer steps between records; None takes ``logging_steps``.
        export_to: Path of the plan, relative to ``output_dir`` (that of the trial in a search); the history is written
            beside it.
        log_experts: Log a curve for each expert, not only the aggregates; None does for up to 4,096 experts. The plan
            and the history always have all of them.
        curvature_batches: Take the curvature from squared gradients of this many more training batches, after the last
            step and at its weights; None reads the optimizer's second moments, which costs nothing, and with
            ``method="auto"`` takes 64 where it has none (SGD, Muon, Lion). On a single process only.
        statistics_batches: Collect the experts' statistics from this many more training batches, after the last step
            and without gradients; they are written beside the plan, and the quantize step rounds under them. None
            takes 32 if the file stays below 1 GB, 0 collects none.
        statistics_from: Collect them in training itself instead, after this share of its steps, such as 0.95: two
            layers at a time, so that few of them are in memory.
        distill_steps: Once the plan is made, quantize the experts under their statistics and train the scales on this
            many more training batches (100 to 300 do most of it), as ``moe-precision quantize --distill-steps`` does.
            Codes and scales are written beside the plan, and the quantize step takes them as they are. Under DDP each
            step is taken on a batch of every process; sharded experts are refused. The log states beforehand what it
            takes beside the model: all codes, 48 bytes for each group of weights, and five float copies of one layer's
            experts. 0 leaves it out.

    Attributes:
        history: The recorded norms.
        plan: The plan, once training has ended.

    Raises:
        ValueError: At construction if method, levels and average do not go together; when training starts if the model
            has no experts, the group size does not divide, or a resumed model is not the checkpoint's.
        OSError: When training starts, if ``export_to`` cannot be written; when it ends, if the disk is full.

    Example:
        >>> callback = RouterNormTrainerCallback(average_bits=2.5, bits=(2, 3))
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    _running = False  # a training that has begun has not ended

    _log_with: Callable[[dict[str, float], int], object] | None = None

    def log_to(self, function: Callable[[dict[str, float], int], object]) -> RouterNormTrainerCallback:
        """Has each record given to a function, in addition to Weights & Biases.

        Args:
            function: Called on the first process with a dict of flat keys and the optimizer step:
                ``mlflow.log_metrics``, ``trackio.log``, or one of yours.

        Returns:
            The same callback.
        """
        self._log_with = function
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        saves_as_float(model)
        if self.curvature_batches is not None and args.world_size > 1:
            raise ValueError(
                f"curvature_batches={self.curvature_batches} needs a single process, and there are {args.world_size}: "
                "the model is inside DDP or FSDP, where a callback cannot reach. Leave it out (the optimizer's second "
                "moments are read), or run moe-precision plan CHECKPOINT --method curvature afterwards"
            )
        # After running out of memory the Trainer begins anew with a smaller batch, and with the weights as they are.
        unfinished = args.auto_find_batch_size and self._running and self._whole is model and state.global_step == 0
        earlier = self.history if unfinished else None
        self._prepare(str(run_folder(args)), anew=True)
        saved = saved_file(args, state, _STATE)
        if saved is not None:
            self.history = RouterNormHistory.load(saved)
            self.history.max_variance = {}
            self._experts = saved_experts(args, state)
            rank_zero_info(f"RouterNormTrainerCallback: continues with the router norms of {saved}")
        if self._start(model, state.global_step, state.max_steps, optimizers=optimizers_of(kwargs)):
            self._log(state)
        self._running = True
        if earlier is not None and earlier.steps and self.history.replace_last(torch.cat(list(earlier.first.values()))):
            rank_zero_warn(
                "RouterNormTrainerCallback: auto_find_batch_size has restarted training, from the weights of the "
                f"attempt that ran out of memory (recorded up to step {earlier.steps[-1]}). The change of norms is "
                "measured from the weights before that attempt; steps and expert loads are counted from here"
            )
        self._loads.counts_as(training=False)  # until a step begins: eval_on_start

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loads.counts_as(training=True)
        self._collecting.before_batch(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._collecting.after_batch(state.global_step)
        self._collecting.before_batch(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loads.counts_as(training=False)
        self._collecting.after_batch(state.global_step)
        self._loads.check_seen(self.settings.method)
        if self._due(state.global_step, int(state.logging_steps)) and self._record(state.global_step):
            self._log(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._record(state.global_step):
            self._log(state)
        if state.is_world_process_zero:
            save_state(self.history.save, args, state, _STATE)
            save_experts(self._layers, args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loads.count_validation()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running = False
        warn_unless_best(self._layers, args, state, type(self).__name__)
        if self._record_final(state.global_step):
            self._ending.attempt("the last router norms", lambda: self._log(state))
        losses: Iterator[Callable[[], Tensor | None]] = iter(())
        if args.world_size == 1:  # else the model is inside DDP or FSDP, where a callback cannot reach
            losses = _losses(kwargs["model"], kwargs.get("train_dataloader"))
        steps = Again(partial(_steps, kwargs["model"], kwargs.get("train_dataloader")))
        plan = self._finish(state.is_world_process_zero, optimizers_of(kwargs), losses, steps)
        if plan is not None and current_run() is not None:
            self._ending.media(current_run, self.history, plan, self._files.paths.plan)
        self._ending.report(self._files.folder)
        self._files.raise_error()

    def _log(self, state: TrainerState) -> None:
        run = current_run()
        if not state.is_world_process_zero or (run is None and self._log_with is None):
            return
        metrics = self._metrics()
        if run is not None:
            run.log({**metrics, "train/global_step": state.global_step})
        if self._log_with is not None:
            self._log_with(metrics, state.global_step)


def _losses(model: Any, batches: Any) -> Iterator[Callable[[], Tensor | None]]:
    for step in _steps(model, batches):
        yield partial(_loss, model, step)


def _steps(model: Any, batches: Any) -> Iterator[Callable[[], Any]]:
    for batch in () if batches is None else batches:  # a stream has no length, and so no truth value
        yield partial(_forward, model, batch)


def _loss(model: Any, step: Callable[[], Any]) -> Tensor | None:
    model.train()  # an evaluation may have run last
    loss: Tensor | None = step().loss
    return loss


def _forward(model: Any, batch: dict[str, Tensor]) -> Any:
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()})
