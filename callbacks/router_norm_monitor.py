"""The Lightning callback that watches each expert's router row and writes a precision plan when training ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from moe_precision.allocation import AllocationError, allocate, levels_of
from moe_precision.callbacks.wandb_media import log_to_wandb
from moe_precision.files import check_writable
from moe_precision.moe_layers import MoELayer, find_moe_layers, root_model
from moe_precision.plan import PrecisionPlan, check_group_size, model_type_of
from moe_precision.router_norms import HistoryError, RouterNormHistory, router_norms


class RouterNormMonitor(Callback):
    """Logs the L2 norm of each expert's router weights and exports a precision plan at the end of training.

    The norms are read when training starts (the baseline), every ``every_n_steps`` optimizer steps, and when it ends.
    They travel with the checkpoint, baseline included, so that an interrupted run goes on where it was. The plan ranks
    experts by how much their router norm changed (arXiv 2604.06515).

    ========================================  ======================================================================
    Logged key, on every logger               Value, a float, at ``step=trainer.global_step``
    ========================================  ======================================================================
    ``router_norm/layer_03/expert_007``       L2 norm of the router's row of expert 7, fourth MoE layer of the model
    ``router_norm/layer_03/{min,median,max}`` the same over the layer's experts
    ``router_norm_change/layer_03/{...}``     min, median and max of the change since the baseline
    ========================================  ======================================================================

    Args:
        average_bits: Nominal bits an expert may have on average.
        bits: Levels to choose from: one, two, or three that are equally spaced, of 1 to 8, or 16.
        method: How experts are ranked: ``router_norm`` (the paper's rule), or a control: ``reversed``, ``random``,
            ``uniform``.
        group_size: Weights that share a scale and an offset when the plan is carried out; divides every expert's
            input width.
        every_n_steps: Optimizer steps between records; None takes the Trainer's ``log_every_n_steps``.
        export_to: Path of the plan, relative to the Trainer's ``default_root_dir``. The recorded norms are written
            beside it: ``precision_plan.history.safetensors``. It also names the callback's state in checkpoints: keep
            it when you resume.

    Attributes:
        history: The recorded norms.
        plan: The plan, once training has ended; the file is the result where strategies spawn processes.

    Raises:
        ValueError: At construction if method, levels and average do not go together; when training starts if the model
            has no experts or the group size does not divide.
        OSError: In ``setup``, if ``export_to`` cannot be written.

    Example:
        >>> monitor = RouterNormMonitor(average_bits=2.5, bits=(2, 3), export_to="precision_plan.json")
        >>> Trainer(callbacks=[monitor], logger=WandbLogger(project="moe")).fit(module, data)
    """

    def __init__(
        self,
        average_bits: float = 2.5,
        bits: Sequence[int] = (2, 3),
        method: str = "router_norm",
        group_size: int = 128,
        every_n_steps: int | None = None,
        export_to: str = "precision_plan.json",
    ) -> None:
        levels_of(method, average_bits, bits)
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1 or None, got {every_n_steps}")
        if Path(export_to).suffix != ".json":
            raise ValueError(f"export_to must end in .json, got {export_to!r}")
        self.average_bits, self.bits, self.method = average_bits, tuple(bits), method
        self.group_size, self.every_n_steps, self.export_to = group_size, every_n_steps, export_to
        self.history = RouterNormHistory()
        self.plan: PrecisionPlan | None = None
        self._layers: list[MoELayer] = []
        self._path: Path | None = None  # None: nothing is written (fast_dev_run)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_to=self.export_to)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._path, self._layers, self.plan = None, [], None
        if trainer.global_step == 0:  # a checkpoint is restored after setup; what another fit recorded does not count
            self.history = RouterNormHistory()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._path = Path(trainer.default_root_dir, self.export_to)
            check_writable(self._path)
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        for callback in later:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                rank_zero_warn(
                    f"RouterNormMonitor: {type(callback).__name__} comes later in the list of callbacks and changes "
                    "the weights after the last norms are read. Put RouterNormMonitor behind it."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = root_model(pl_module)
        self._layers = find_moe_layers(model)
        fresh = RouterNormHistory.of(self._layers, model_type_of(model))
        for name, layer in fresh.layers.items():
            check_group_size(self.group_size, name, layer.projections)
        experts = sum(layer.num_experts for layer in self._layers)
        rank_zero_info(f"RouterNormMonitor: {len(self._layers)} MoE layers with {experts} experts")
        if self.history.steps:
            if self.history.layers != fresh.layers:
                raise HistoryError(
                    f"the checkpoint's router norms are of layers {list(self.history.layers)}, this model has "
                    f"{list(fresh.layers)}, or their shapes differ"
                )
        else:
            self.history = fresh
            if trainer.global_step > 0:
                rank_zero_warn(
                    f"RouterNormMonitor: training resumes at step {trainer.global_step} from a checkpoint without "
                    f"router norms for export_to={self.export_to!r}. The change is measured from here, not from the "
                    "start of training."
                )
        self._record(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Crossing a multiple, not hitting it: with two optimizers global_step rises by two a batch.
        if every and trainer.global_step // every > self.history.steps[-1] // every:
            self._record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer)
        if len(self.history.steps) < 2:
            rank_zero_warn("RouterNormMonitor: no plan is written, because no optimizer step was taken.")
            return
        writes = trainer.is_global_zero and self._path is not None
        if writes:
            self.history.save(self._history_path)  # whatever happens below, the record is kept
        self.history.measure_variance(self._layers)
        try:
            self.plan = allocate(
                history=self.history,
                method=self.method,
                average_bits=self.average_bits,
                bits=self.bits,
                group_size=self.group_size,
            )
        except AllocationError as error:  # of norms that are not finite; other callbacks still have to save the model
            rank_zero_warn(f"RouterNormMonitor: no plan is written: {error}")
            return
        if writes:
            assert self._path is not None
            self.history.save(self._history_path)
            self.plan.save(self._path)
            rank_zero_info(f"RouterNormMonitor: wrote {self._path} ({self.plan.average_bits:.3g} bits on average)")
            for logger in trainer.loggers:
                log_to_wandb(logger, self.history, self.plan, self._path)
        trainer.strategy.barrier("RouterNormMonitor.on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._layers:  # on_train_start was never called
            rank_zero_warn("RouterNormMonitor: no plan is written, because training took no step (max_steps=0?).")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # No collective here: one rank may have failed alone. What was recorded is kept.
        if trainer.is_global_zero and self._path is not None and self.history.steps:
            self.history.save(self._history_path)

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict)

    @property
    def _history_path(self) -> Path:
        assert self._path is not None
        return self._path.with_suffix(".history.safetensors")

    def _record(self, trainer: Trainer) -> None:
        """Reads all norms, on all ranks (a collective under FSDP2), and logs them."""
        step = trainer.global_step
        if self.history.steps and step <= self.history.steps[-1]:
            return
        self.history.record(step, router_norms(self._layers))
        if trainer.loggers and trainer.is_global_zero:
            metrics = self.history.metrics()
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
