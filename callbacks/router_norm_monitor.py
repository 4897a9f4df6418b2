"""The Lightning callback that records each expert's router norm and writes a precision plan when training ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn

from moe_precision.callbacks.extra_batches import takes
from moe_precision.callbacks.late_finish import is_finished, why_not_late
from moe_precision.callbacks.lightning_packages import LightningCallback, averages_weights, is_called, total_steps
from moe_precision.callbacks.plan_recorder import PlanRecorder
from moe_precision.callbacks.statistics_recorder import Again
from moe_precision.layers.module_tree import root_model
from moe_precision.recording.expert_samples import ExpertSamples

_MANUAL = "needs automatic optimization: this module steps its own optimizers, and no batch runs without its step"


class RouterNormMonitor(PlanRecorder, LightningCallback):
    """Logs the L2 norm of each expert's router weights and exports a precision plan at the end of training.

    The norms are read when training starts (the baseline), every ``every_n_steps`` optimizer steps, and when it ends.
    Checkpoints hold them, baseline included, so an interrupted run resumes with all its records. The plan ranks
    experts by how much their router norm changed (arXiv 2604.06515).

    | Logged key, on every logger | Value, a float, at ``step=trainer.global_step`` |
    |---|---|
    | ``router_norm/layer_03/expert_007`` | L2 norm of the router's row of expert 7, fourth MoE layer of the model |
    | ``router_norm/layer_03/{min,median,max}`` | the same over the layer's experts |
    | ``router_norm_change/layer_03/{...}`` | min, median and max of the change since the baseline |
    | ``expert_load/layer_03/{min,median,max}`` | tokens of an expert since the last record; 1 is an equal share |
    | ``plan/changed`` | share of experts whose bits the last record changed; ``router_norm`` alone |

    Args:
        method: How widths are chosen. ``router_norm`` is the paper's rule; ``statistics`` and ``curvature`` minimize
            the predicted increase of the loss. ``auto`` takes the best one that the run can have: ``statistics`` where
            they were collected and the optimizer keeps second moments, else ``curvature``, else the paper's rule; the
            plan and the log say which and why. ``moe-precision plan --help`` lists all of them.
        average_bits: Budget in nominal bits per expert weight; 2.5 if no budget is given.
        stored_bits: Budget with scales and offsets included, instead of ``average_bits``.
        expert_gib: Budget as the size of all routed experts in the file, in GiB, instead of ``average_bits``.
        total_gib: Budget as the size of the whole model in the file, in GiB, instead of ``average_bits``.
        rest_gib: What everything but the routed experts takes, for ``total_gib``; None for what the model has.
        bits: Levels to choose from, of 1 to 8, or 16: one, two, or three that are equally spaced, by default 2 and 3;
            any number for a method that knows costs (``statistics``, ``curvature``, ``weight_error``), by default 1 to
            4. With 0 among them experts may be dropped, which needs expert statistics.
        group_size: Weights that share a scale and an offset when the plan is carried out; divides every expert's input
            width.
        granularity: What shares a width: ``expert``; for methods that know costs also ``expert+projection``, their
            default, ``layer`` or ``layer+projection``.
        seed: For ``method="random"`` and ``"shuffled_curvature"``.
        zeta: Factor of the paper's reorder rule.
        max_dropped: Largest share of a layer's experts that may be dropped, where ``bits`` has 0.
        min_tokens: Tokens of the statistics below which an expert is not dropped.
        router_pattern: Regular expression that names the routers' weights, for models whose routers cannot be found by
            structure; see `find_moe_layers`.
        expert_pattern: Regular expression that names the experts' weights.
        layout: Instead of patterns, the framework whose layout the model has, such as ``megatron``.
        module: Path of the model to record in the LightningModule, such as ``student``; None takes the only one that is
            trained.
        every_n_steps: Optimizer steps between records; None takes the Trainer's ``log_every_n_steps``.
        export_to: Path of the plan, relative to the Trainer's ``default_root_dir``. The recorded norms are written
            beside it: ``precision_plan.history.safetensors``. It also names the callback's state in checkpoints: keep
            it when you resume.
        log_experts: Log a curve for each expert, not only the aggregates; None does for up to 4,096 experts. The plan
            and the history always have all of them.
        curvature_batches: Take the curvature from squared gradients of this many more training batches, after the last
            step and at its weights; None reads the optimizer's second moments, which costs nothing, and with
            ``method="auto"`` takes 64 where it has none (SGD, Muon, Lion).
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
        plan: The plan, once training has ended; the file is the result where strategies spawn processes.

    Raises:
        ValueError: At construction if method, levels and average do not go together; when training starts if the model
            has no experts or the group size does not divide an input width.
        OSError: In ``setup``, if ``export_to`` cannot be written; in ``on_fit_end``, if it could not be written after
            all (a full disk), after all other callbacks have done their work.

    Example:
        >>> monitor = RouterNormMonitor(average_bits=2.5, bits=(2, 3), export_to="precision_plan.json")
        >>> Trainer(callbacks=[monitor], logger=WandbLogger(project="moe")).fit(module, data)
    """

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_to=self.export_to)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # A checkpoint is restored after setup, and nothing is written in a fast_dev_run.
        folder = None if trainer.fast_dev_run else trainer.default_root_dir  # type: ignore[attr-defined]
        self._prepare(folder, anew=trainer.global_step == 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.curvature_batches is not None and not pl_module.automatic_optimization:
            raise ValueError(
                f"curvature_batches={self.curvature_batches} needs automatic optimization: this module steps its own "
                "optimizers, so its loss cannot be computed without a step"
            )
        obstacle = "" if pl_module.automatic_optimization else _MANUAL
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        for callback in filter(averages_weights, later):
            rank_zero_warn(
                f"RouterNormMonitor: {type(callback).__name__} comes later in the list of callbacks and changes "
                "the weights after the last norms are read. Put RouterNormMonitor after it."
            )
        steps, total = trainer.global_step, total_steps(trainer, pl_module)
        # strategy.model: FSDP1's root unit is around the LightningModule
        if self._start(trainer.strategy.model or pl_module, steps, total, obstacle, trainer.optimizers):
            self._log(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._loads.counts_as(training=True)
        self._collecting.before_batch(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._collecting.after_batch(trainer.global_step)
        self._loads.check_seen(self.settings.method)
        if self._due(trainer.global_step, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            self._record(trainer.global_step)
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._record_final(trainer.global_step):
            self._log(trainer, ending=True)
        losses, steps = (
            _losses(trainer, pl_module),
            Again(partial(_steps, trainer, pl_module, self._model or pl_module)),
        )
        try:
            plan = self._finish(trainer.is_global_zero, trainer.optimizers, losses, steps)
        except Exception as error:
            if trainer.world_size > 1:  # the other processes may wait for this one
                raise
            plan = None
            self._files.keep(error)  # until others have saved the model
        if plan is not None:
            for logger in (one for one in trainer.loggers if is_called(one, "WandbLogger")):
                self._ending.media(partial(getattr, logger, "experiment"), self.history, plan, self._files.paths.plan)
        self._seen.look(self._layers)
        trainer.strategy.barrier("RouterNormMonitor.on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._layers and is_finished(trainer) and len(self.history.steps) > 0:
            self._finish_late(trainer, pl_module)
        elif not self._layers:  # on_train_start was never called
            why = "training had ended before this start, and the checkpoint has no router norms"
            why = why if is_finished(trainer) else "training took no step (max_steps=0?)"
            rank_zero_warn(f"RouterNormMonitor: no plan is written, because {why}.")
        elif self._seen.changed(self._layers):
            rank_zero_warn(
                "RouterNormMonitor: the weights were changed after training had ended and the last norms were read: by "
                "a callback that comes later in the list (weight averaging), or in the module's on_train_end. The plan "
                "is not of the weights that are left. Put RouterNormMonitor after what changes them."
            )
        self._seen.forget()
        self._ending.report(self._files.folder)
        self._files.raise_error()

    def _finish_late(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what a finished run has not written, because it was stopped between its last step and its end."""
        if trainer.fast_dev_run or self._files.has_plan(trainer.global_step):  # type: ignore[attr-defined]
            return
        if reason := why_not_late(trainer, pl_module):
            self._save_history()
            rank_zero_warn(f"RouterNormMonitor: training had ended before this start, and no plan is written: {reason}")
            return
        self._start_late(pl_module, trainer.global_step)
        if self._record_final(trainer.global_step):
            self._log(trainer, ending=True)
        self._finish(trainer.is_global_zero, trainer.optimizers)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loads.counts_as(training=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._loads.count_validation()  # what runs until the next batch is neither

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loads.counts_as(training=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # No collective here: one rank may have failed alone. What was recorded is kept.
        self._loads.stop()
        self._collecting.close()
        if trainer.is_global_zero:
            self._save_history()

    def state_dict(self) -> dict[str, Any]:
        self._loads.count()  # checkpoints are made on all ranks
        return self.history.state_dict() | {"experts": ExpertSamples.of(self._layers).state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict)
        self._experts = ExpertSamples(state_dict.get("experts"))

    def _log(self, trainer: Trainer, ending: bool = False) -> None:
        if trainer.loggers and trainer.is_global_zero:
            metrics = self._metrics()
            for logger in trainer.loggers:
                log = partial(logger.log_metrics, metrics, step=trainer.global_step)
                if ending:
                    self._ending.attempt(f"the last router norms to {type(logger).__name__}", log)
                else:
                    log()


def _losses(trainer: Trainer, pl_module: LightningModule) -> Iterator[Callable[[], Tensor | None]]:
    """The module's own training loss on one more pass over the training data, as the training loop computes it."""
    for batch, index in _batches(trainer):
        yield partial(_loss, trainer, pl_module, batch, index)


def _steps(trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Iterator[Callable[[], Any]]:
    """One more pass over the training data: by the model where a batch is its arguments, else as training steps.

    With several processes always as training steps, since what is around the model may have to gather its weights.
    """
    for batch, index in _batches(trainer):
        if trainer.world_size == 1 and takes(model, batch):
            yield partial(_forward, trainer, model, batch)
        else:
            yield partial(_loss, trainer, pl_module, batch, index)


def _batches(trainer: Trainer) -> Iterator[tuple[Any, int]]:
    for batch, index, _ in CombinedLoader(trainer.train_dataloader, "max_size_cycle"):
        yield batch, index


def _moved(trainer: Trainer, batch: Any) -> Any:
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _forward(trainer: Trainer, model: nn.Module, batch: Any) -> None:
    with trainer.precision_plugin.forward_context():
        root_model(model)(**_moved(trainer, batch))


def _loss(trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> Tensor | None:
    batch = _moved(trainer, batch)
    with _unlogged(pl_module):
        output = trainer.strategy.training_step(batch, index)
    return output["loss"] if isinstance(output, Mapping) else output


@contextmanager
def _unlogged(pl_module: LightningModule) -> Iterator[None]:
    """Inside, ``self.log`` does nothing: these batches are not part of the run's metrics."""
    pl_module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del pl_module.__dict__["log"]
