"""The Lightning callback that ends training on a plan: the last steps go through the quantization grid."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks.late_finish import is_finished, why_not_late
from moe_precision.callbacks.lightning_packages import LightningCallback, averages_weights, total_steps
from moe_precision.callbacks.plan_annealer import PlanAnnealer
from moe_precision.callbacks.router_norm_monitor import RouterNormMonitor
from moe_precision.callbacks.save_pretrained import SavePretrained
from moe_precision.callbacks.scale_distiller import refuse_distilling
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.history import RouterNormHistory


class PrecisionAnneal(PlanAnnealer, LightningCallback):
    """Ends training on a precision plan: from ``start`` on, every forward pass uses the quantized expert weights.

    At ``start`` the plan is made, if none is given, and scales and offsets are fixed. From then on forward passes use
    the nearest weights on that grid and gradients go straight through to the float weights, which the optimizer keeps.
    When training ends the float weights are moved onto the grid, and plan and grid are written: ``moe-precision
    quantize`` packs exactly the codes that training ended on. List it before `SavePretrained`.

    | Logged key | Value, at ``step=trainer.global_step`` |
    |---|---|
    | ``anneal/active`` | 1 from ``start`` on, 0 before |
    | ``anneal/flips`` | share of codes that the step changed, in a sample of each matrix |
    | ``anneal/rate_factor`` | with ``cooldown``: what the step's learning rates were multiplied by |
    | ``anneal/kl`` | KL divergence from the teacher on the step's last training batch, in nats per token |
    | ``anneal/val_loss`` | loss of the transformers model on the validation batches, on the grid |
    | ``anneal/val_loss_float`` | the same with the float weights that the optimizer keeps, same step |
    | ``anneal/val_kl`` | KL divergence from the teacher on the validation batches, on the grid |

    The two losses take two more forward passes of every validation batch, the divergence, where there is a teacher, a
    third. They are logged if a batch holds the keyword arguments of a transformers model, labels included.

    Args:
        start: When to begin: a share of training below 1, a step, or ``auto``: the last tenth, or more where the run
            has many tokens per byte of the quantized experts (`annealed_share`), which the first ten steps show; with
            a ``teacher`` the whole run.
        plan: A `PrecisionPlan` or its path; None makes one at ``start``. The curvature file beside a path
            weights the fit of the grid where the optimizer has no second moments yet (``start=0``).
        method: How widths are chosen, if no plan is given; a method that reads router norms needs
            `RouterNormMonitor` in the Trainer. ``router_norm`` is the paper's rule; ``curvature`` minimizes the
            predicted increase of the loss. ``moe-precision plan --help`` lists all of them.
        average_bits: Budget in nominal bits per expert weight; 2.5 if no budget is given.
        stored_bits: Budget with scales and offsets included, instead of ``average_bits``.
        expert_gib: Budget as the size of all routed experts in the file, in GiB, instead of ``average_bits``.
        total_gib: Budget as the size of the whole model in the file, in GiB, instead of ``average_bits``.
        rest_gib: What everything but the routed experts takes, for ``total_gib``; None for what the model has.
        bits: Levels to choose from, of 1 to 8, or 16: one, two, or three that are equally spaced, by default 2 and 3;
            any number for a method that knows costs (``curvature``, ``weight_error``), by default 1 to 4.
        group_size: Weights that share a scale and an offset when the plan is carried out; divides every expert's input
            width.
        granularity: What shares a width: ``expert``; for methods that know costs also ``expert+projection``, their
            default, ``layer`` or ``layer+projection``.
        seed: For ``method="random"`` and ``"shuffled_curvature"``.
        zeta: Factor of the paper's reorder rule.
        max_dropped: Largest share of a layer's experts that may be dropped, where ``bits`` has 0.
        min_tokens: Tokens of the statistics below which an expert is not dropped.
        statistics_steps: Steps before ``start`` that are recorded for the experts' statistics, under which codes are
            rounded when annealing begins, and which ``method="statistics"`` and 0 bits need; 0 for none. With
            ``start=0`` any number takes the statistics beside the plan. It pays off where few steps are left.
        teacher: What annealed steps learn from, beside or in place of the labels: ``start``, the predictions of the
            model as it is when annealing begins, or a float checkpoint of the same class and shapes (folder, or name in
            the Hub's cache). It takes the memory of its weights and one more forward pass per batch. The training step
            must use the ``loss`` of a transformers model; where FSDP2 shards it, the model must be a unit of its own.
        teacher_weight: Share of the cross-entropy that KL(teacher || model) takes the place of: above 0, at most 1.
        cooldown: Whether learning rates fall to 0 in the annealed steps, as a factor over what the run's own schedule
            sets. For runs at a constant rate; a schedule that falls to its end needs none. Cooling down in float and
            quantizing afterwards was better in docs/evidence.md.
        router_pattern: Regular expression that names the routers' weights, for models whose routers cannot be found by
            structure; see `find_moe_layers`.
        expert_pattern: Regular expression that names the experts' weights.
        layout: Instead of patterns, the framework whose layout the model has, such as ``megatron``.
        module: Path of the model in the LightningModule, such as ``student``; None takes the only one that is trained.
        export_to: Path of the plan, relative to the Trainer's ``default_root_dir``; the grid is written beside it,
            ``annealed_plan.grid.safetensors``.

    Attributes:
        plan: The plan, once it is known.
        grid: The grid, once annealing has begun.

    Raises:
        ValueError: At construction if method, levels and average do not go together; when training starts if the plan
            is for another model, ``start`` is not before the end, an expert weight is frozen or behind an adapter,
            weights are averaged, or the teacher is of another model.

    Example:
        >>> anneal = PrecisionAnneal(start=0.9, average_bits=2.0, bits=(1, 2, 3))
        >>> Trainer(callbacks=[anneal, SavePretrained()], max_steps=10_000).fit(module, data)
    """

    _logged_step = _seen_step = 0
    _started = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_to=self.export_to)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _refuse_averaging(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, SavePretrained):
                raise AnnealError("SavePretrained saves the weights before they are on the grid: put it after this one")
        for callback in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(callback, RouterNormMonitor):
                raise AnnealError(
                    "RouterNormMonitor would make its plan from weights that are on the grid: put it before this one"
                )
        for callback in callbacks:
            if isinstance(callback, RouterNormMonitor):
                refuse_distilling(callback.distill_steps)
        # A checkpoint is restored after setup, and nothing is written in a fast_dev_run.
        folder = None if trainer.fast_dev_run else trainer.default_root_dir  # type: ignore[attr-defined]
        self._prepare(folder, anew=trainer.global_step == 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = self._seen_step = trainer.global_step
        self._started = True
        _refuse_averaging(trainer)  # once all callbacks are set up, it shows in those of other packages too
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which is too short to anneal anything
            total = total_steps(trainer, pl_module)
            obstacle = "" if pl_module.automatic_optimization else "the module steps its own optimizers"
            model, step = self._part(pl_module), trainer.global_step
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._check(model, step, total, _history(trainer), trainer.optimizers, schedulers, obstacle)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = trainer.global_step
        if not pl_module.automatic_optimization:  # how many steps a batch takes shows as it goes
            self._start.set(total_steps(trainer, pl_module))
        logged = self._crosses(trainer, step + len(trainer.optimizers))  # each optimizer's step counts
        self._before_step(self._part(pl_module), trainer.optimizers, _history(trainer), step, logged)
        self._start.see(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._statistics.after_batch(step)
        if step == self._seen_step:  # a micro-batch
            return
        self._seen_step = step
        self._after_step(step)
        if self._crosses(trainer, step):
            self._logged_step = step
            self._log(trainer, self._metrics())

    def _crosses(self, trainer: Trainer, step: int) -> bool:
        """Whether a multiple of the logging interval lies between the last log and a step."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(trainer.loggers) and every > 0 and step // every > self._logged_step // every

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.loggers and not trainer.sanity_checking:
            with trainer.precision_plugin.forward_context():
                self._losses.add(self._part(pl_module), batch, self._hooks, self._taught.teacher)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums = self._losses.sums
        if sums is not None:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        if metrics := self._losses.take(sums):
            self._log(trainer, metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hooks is not None:
            self._seen.look(self._hooks.layers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._finish(trainer.is_global_zero, trainer.global_step)
        trainer.strategy.barrier("PrecisionAnneal.on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._started and self.grid is not None and is_finished(trainer):
            if reason := why_not_late(trainer, pl_module):
                rank_zero_warn(f"PrecisionAnneal: training had ended before this start; no plan is written: {reason}")
            else:
                self._finish_late(self._part(pl_module), trainer.is_global_zero, trainer.global_step)
        self._started = False
        self._seen.check_left()
        self._files.raise_error()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        grid = {} if self.grid is None else self.grid.state_dict()
        return {**grid, "found": dict(self._start.found)} if self._start.found else grid

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":  # one of before annealing has no grid, and brings no state to load
            self.grid, self.plan = None, self._given
            self._start.restore({})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start.restore(state_dict.get("found", {}))
        if "plan" in state_dict:
            self.grid = Grid.from_state_dict(state_dict)
            self.plan = self.grid.plan

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)


def _refuse_averaging(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if averages_weights(callback):
            raise AnnealError(
                f"{type(callback).__name__} averages weights of several steps, which are not on a grid: leave it "
                "out, or average first and anneal the average afterwards"
            )


def _history(trainer: Trainer) -> RouterNormHistory | None:
    """What `RouterNormMonitor` recorded in this run, if the Trainer has one."""
    monitors = [c for c in trainer.callbacks if isinstance(c, RouterNormMonitor)]  # type: ignore[attr-defined]
    return monitors[0].history if monitors else None
