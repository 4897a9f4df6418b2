"""The Lightning callback that lets training end on a plan: the last steps go through the quantization grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from moe_precision.allocation import PLAN_METHODS, AllocationError, allocate, check_granularity, levels_of
from moe_precision.annealing import AnnealError, GridHooks, check_trainable
from moe_precision.callbacks.router_norm_monitor import RouterNormMonitor
from moe_precision.curvature import Curvature, CurvatureError, curvature_of
from moe_precision.files import check_writable
from moe_precision.moe_layers import MoELayer, find_moe_layers, root_model
from moe_precision.plan import PrecisionPlan, as_plan, check_group_size, model_type_of
from moe_precision.quantize.grid import Grid

_NEED_HISTORY = ("router_norm", "norm_only", "reversed", "load", "least_load")


class PrecisionAnneal(Callback):
    """Ends training on a precision plan: from ``start`` on, every forward pass uses the quantized expert weights.

    At ``start`` the plan is made, if none is given, and scales and offsets are fixed. From then on forward passes use
    the nearest weights on that grid and gradients go straight through to the float weights, which the optimizer keeps.
    When training ends the float weights are moved onto the grid, and plan and grid are written: ``moe-precision
    quantize`` packs exactly the codes that training ended on. Put it in front of `SavePretrained`.

    ==================  ============================================================================
    Logged key          Value, at ``step=trainer.global_step``
    ==================  ============================================================================
    ``anneal/active``   1 from ``start`` on, 0 before
    ``anneal/flips``    share of all codes that the step changed
    ==================  ============================================================================

    Args:
        start: When to begin: a share of ``max_steps`` below 1, or a step.
        plan: A `PrecisionPlan`, its dict or its path; None makes one at ``start``.
        average_bits: Nominal bits an expert may have on average, for a plan that is made.
        bits: Levels to choose from.
        method: How widths are chosen, as in `RouterNormMonitor`; one that reads router norms needs it in the Trainer.
        granularity: What shares a width, for methods that know costs.
        group_size: Weights that share a scale and an offset.
        export_to: Path of the plan, relative to the Trainer's ``default_root_dir``; the grid is written beside it,
            ``annealed_plan.grid.safetensors``.

    Attributes:
        plan: The plan, once it is known.
        grid: The grid, once annealing has begun.

    Raises:
        ValueError: At construction if method, levels and average do not go together; when training starts if the plan
            is of another model, ``start`` is not before the end, an expert weight is frozen or behind an adapter, or
            weights are averaged.

    Example:
        >>> anneal = PrecisionAnneal(start=0.9, average_bits=2.0, bits=(1, 2, 3))
        >>> Trainer(callbacks=[anneal, SavePretrained()], max_steps=10_000).fit(module, data)
    """

    def __init__(
        self,
        start: float = 0.9,
        plan: PrecisionPlan | dict | str | None = None,
        average_bits: float = 2.5,
        bits: Sequence[int] = (2, 3),
        method: str = "curvature",
        granularity: str = "expert",
        group_size: int = 128,
        export_to: str = "annealed_plan.json",
    ) -> None:
        if method not in PLAN_METHODS:
            raise AllocationError(f"unknown method {method!r}, expected one of {', '.join(PLAN_METHODS)}")
        levels_of(method, average_bits, bits)
        check_granularity(method, granularity)
        if start < 0 or (start >= 1 and start != int(start)):
            raise ValueError(f"start must be a share of max_steps below 1 or a whole step, got {start}")
        if Path(export_to).suffix != ".json":
            raise ValueError(f"export_to must end in .json, got {export_to!r}")
        self.start, self.average_bits, self.bits, self.method = start, average_bits, tuple(bits), method
        self.granularity, self.group_size, self.export_to = granularity, group_size, export_to
        self._given = None if plan is None else as_plan(plan)
        self.plan = self._given
        self.grid: Grid | None = None
        self._hooks: GridHooks | None = None
        self._first_step = 0  # of annealing
        self._before: list[Tensor] = []  # codes before the step, on steps that are logged
        self._logged_step = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(export_to=self.export_to)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.global_step == 0:  # a checkpoint is restored after setup
            self.grid, self.plan = None, self._given
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                raise AnnealError(
                    f"{type(callback).__name__} averages weights of several steps, which are on no grid: leave it out, "
                    "or average first and anneal the average afterwards"
                )
        check_writable(Path(trainer.default_root_dir, self.export_to))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = find_moe_layers(pl_module)
        check_trainable(layers)
        group_size = self.group_size if self.plan is None else self.plan.group_size
        for layer in layers:
            check_group_size(group_size, layer.name, layer.projections)
        if self.plan is not None:
            self.plan.check_layers({layer.name: layer.shape for layer in layers}, model_type_of(root_model(pl_module)))
        total = trainer.estimated_stepping_batches
        if self.start < 1 and total == float("inf"):
            raise AnnealError(f"start={self.start} is a share of max_steps, which is not set: set it, or give a step")
        self._first_step = int(self.start * total) if self.start < 1 else int(self.start)
        if self._first_step >= total:
            raise AnnealError(f"start={self.start} is step {self._first_step} of {total}: nothing is left to anneal")
        self._before, self._logged_step = [], trainer.global_step
        if self.grid is not None:  # resumed in the middle
            self._hooks = GridHooks(layers, self.grid)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._hooks is None and trainer.global_step >= self._first_step:
            self._begin(trainer, find_moe_layers(pl_module))
        if self._hooks is not None and self._logs(trainer) and not self._before:
            self._before = self._hooks.codes()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.loggers or step % every or step == self._logged_step:  # micro-batches do not count
            return
        self._logged_step = step
        metrics = {"anneal/active": float(self._hooks is not None)}
        if self._hooks is not None and self._before:
            pairs = list(zip(self._before, self._hooks.codes(), strict=True))
            flipped, total = sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)
            metrics["anneal/flips"] = flipped / total
            self._before = []
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hooks is None or self.grid is None or self.plan is None:
            return
        self._hooks.settle()
        self._hooks.close()
        self._hooks = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(trainer.default_root_dir, self.export_to)
            self.grid.save(path.with_suffix(".grid.safetensors"))
            self.plan.save(path)
            rank_zero_info(f"PrecisionAnneal: wrote {path} ({self.plan.average_bits:.3g} bits on average) and its grid")
        trainer.strategy.barrier("PrecisionAnneal.on_train_end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.grid is None else self.grid.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.grid = Grid.from_state_dict(state_dict)
            self.plan = self.grid.plan

    def _logs(self, trainer: Trainer) -> bool:
        return bool(trainer.loggers) and (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _begin(self, trainer: Trainer, layers: list[MoELayer]) -> None:
        """Makes the plan if there is none, fixes the grid, and puts it into every forward pass."""
        curvature = _curvature(layers, trainer.optimizers)
        if self.plan is None:
            monitors = [c for c in trainer.callbacks if isinstance(c, RouterNormMonitor)]  # type: ignore[attr-defined]
            history = monitors[0].history if monitors else None
            if history is None and self.method in _NEED_HISTORY:
                raise AnnealError(f"method {self.method!r} reads what RouterNormMonitor records: add it too")
            self.plan = allocate(
                trainer.lightning_module,
                history,
                self.method,
                self.average_bits,
                self.bits,
                self.group_size,
                curvature=curvature,
                granularity=self.granularity,
            )
        self.grid = Grid.fit(layers, self.plan, curvature)
        self._hooks = GridHooks(layers, self.grid)
        rank_zero_info(
            f"PrecisionAnneal: from step {trainer.global_step} on the experts are trained at "
            f"{self.plan.average_bits:.3g} bits on average"
        )


def _curvature(layers: list[MoELayer], optimizers: Any) -> Curvature | None:
    try:
        return curvature_of(layers, optimizers)
    except CurvatureError as error:
        rank_zero_info(f"PrecisionAnneal: the grid is fitted without curvature: {error}")
        return None
