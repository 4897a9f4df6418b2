"""What the annealing callbacks share: when to begin, the plan and its grid, what is logged, files at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from moe_precision.allocation.allocator import make_plan
from moe_precision.allocation.whole_model import with_rest
from moe_precision.annealing.covers import AnnealError, put_bank
from moe_precision.annealing.hooks import GridHooks, check_trainable, uncover
from moe_precision.callbacks.anneal_start import AnnealStart
from moe_precision.callbacks.code_flips import CodeFlips
from moe_precision.callbacks.files_beside import FilesBeside
from moe_precision.callbacks.grid_losses import GridLosses
from moe_precision.callbacks.plan_to_come import PlanToCome
from moe_precision.callbacks.rate_cooldown import RateCooldown
from moe_precision.callbacks.run_files import RunFiles
from moe_precision.callbacks.settled_weights import SettledWeights
from moe_precision.callbacks.statistics_before import StatisticsBefore
from moe_precision.callbacks.taught_steps import TaughtSteps
from moe_precision.callbacks.trained_part import TrainedPart
from moe_precision.layers.moe_layers import MoELayer, find_moe_layers
from moe_precision.layers.patterns import Patterns
from moe_precision.plans.methods import AUTO, MethodName, reads
from moe_precision.plans.plan import as_plan
from moe_precision.plans.settings import MAX_DROPPED, MIN_TOKENS, ZETA, PlanSettings
from moe_precision.plans.widths import Granularity
from moe_precision.quantize.codec.grid import Grid
from moe_precision.quantize.replace import check_packable
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.second_moments import curvature_of

_RESCUE = "callback.plan.save(path) and callback.grid.save(path) write them elsewhere"


class PlanAnnealer:
    """What a callback inherits in addition to its trainer's base class; arguments as in `PrecisionAnneal`.

    Fitting, counting and settling are collectives under FSDP2: `_before_step`, `_after_step`, `_metrics` and `_finish`
    are called on all ranks.

    Attributes:
        settings: What is asked for, if the plan is made at ``start``.
        plan: The plan, once it is known.
        grid: The grid, once annealing has begun.
    """

    _recorder = "RouterNormMonitor"

    def __init__(
        self,
        *,
        start: float | Literal["auto"] = 0.9,
        plan: Any = None,  # with PrecisionPlan here, jsonargparse would read the file and lose its path
        method: MethodName = "curvature",
        average_bits: float | None = None,
        stored_bits: float | None = None,
        expert_gib: float | None = None,
        total_gib: float | None = None,
        rest_gib: float | None = None,
        bits: Sequence[int] | None = None,
        group_size: int = 128,
        granularity: Granularity | None = None,
        seed: int = 0,
        zeta: float = ZETA,
        max_dropped: float = MAX_DROPPED,
        min_tokens: int = MIN_TOKENS,
        statistics_steps: int = 0,
        teacher: str | None = None,
        teacher_weight: float = 1.0,
        cooldown: bool = False,
        router_pattern: str | None = None,
        expert_pattern: str | None = None,
        layout: str | None = None,
        module: str | None = None,
        export_to: str = "annealed_plan.json",
    ) -> None:
        self.settings = PlanSettings.among(locals())
        self.settings.check_plannable()
        self._start = AnnealStart(type(self).__name__, start, whole=teacher is not None)
        if plan is None and not statistics_steps and (reads(method, "statistics") or self.settings.may_drop):
            needing = "0 among the levels" if self.settings.may_drop else f"method {method!r}"
            raise ValueError(f"{needing} needs expert statistics: give statistics_steps=32, the steps that record them")
        self._statistics = StatisticsBefore(type(self).__name__, statistics_steps)
        self._taught = TaughtSteps(type(self).__name__, teacher, teacher_weight)
        self._cooldown = RateCooldown(type(self).__name__, cooldown)
        self._files = RunFiles(export_to, type(self).__name__, _RESCUE)
        self.export_to, self._trained = export_to, TrainedPart(module)
        self._given = None if plan is None else as_plan(plan)
        self._beside = FilesBeside(type(self).__name__, plan)
        self.plan = self._given
        self.grid: Grid | None = None
        self._hooks: GridHooks | None = None
        self._began_at = self._started_at = 0  # steps of this process, which a checkpoint may have brought forward
        self._checked = self._used = False  # the optimizer keeps second moments; every layer has gone through the grid
        self._flips = CodeFlips()
        self._seen = SettledWeights(type(self).__name__)  # at the end
        self._losses = GridLosses()  # of the validation run

    def _prepare(self, folder: str | None, anew: bool) -> None:
        """Before training: where the plan goes, checked to be writable; None for a run that writes nothing."""
        self._flips, self._losses = CodeFlips(), GridLosses()
        self._seen.forget()
        self._trained.forget()
        self.close()
        if anew:
            self.grid, self.plan = None, self._given
            self._start.restore({})
        self._files.prepare(folder)

    def _check(
        self,
        model: nn.Module,
        step: int,
        total: float,
        history: RouterNormHistory | None,
        optimizers: Sequence[Any],
        schedulers: Sequence[Any],
        obstacle: str = "",
    ) -> None:
        """Checks everything before the first step; continues with the grid if a checkpoint brought one.

        Args:
            model: The model, or a wrapper around it.
            step: Where training starts.
            total: Where it ends.
            history: Of the callback that records router norms, if there is one.
            optimizers: Those that train it.
            schedulers: Of their learning rates.
            obstacle: Why the steps before annealing cannot be recorded, if they cannot.
        """
        layers = find_moe_layers(model, **self._patterns())
        uncover(layers)
        check_trainable(layers)
        check_packable(model, layers)
        self._taught.check(model, self.grid, self._files)
        shapes = {layer.name: layer.shape for layer in layers}
        if self.plan is not None:
            self.plan = self.plan.for_model(model, shapes)
        else:
            self.settings = with_rest(self.settings, model)
            self.settings.check_fits(shapes)
        self._start.check(total, step, None if self.grid is None else self.grid.plan)
        self._cooldown.check(total, optimizers, schedulers)
        if self._start.first >= total:
            raise AnnealError(
                f"start={self._start.asked} is step {self._start.first} of {total}: nothing is left to anneal"
            )
        if self.plan is None:
            self._to_come(history).check(layers, optimizers)
        if self._start.first == 0 and self.grid is None:
            self._beside.check(layers, self._statistics.asked)
        if self.grid is None and not (self._start.first == 0 and self._beside.has_statistics):
            self._statistics.start(model, layers, step, self._start.first, obstacle)
        self._started_at, self._checked, self._used = step, False, False
        if self.grid is None and step - max(1, len(optimizers)) >= self._start.first:  # a batch has a step of each
            raise AnnealError(
                f"training resumes at step {step}, annealing began at {self._start.first}, and the checkpoint has no "
                f"grid of a callback with export_to={self.export_to!r}: resume with the callback that the run had"
            )
        if self.grid is not None:  # resumed in the middle
            if self._given is not None and (changed := self._given.for_model(model, shapes).diff(self.grid.plan)):
                raise AnnealError(f"the checkpoint was annealed on a plan other than the given one: {changed[0]}")
            self._put_on_grid(model, layers, step)

    def _put_on_grid(self, model: nn.Module, layers: list[MoELayer], step: int) -> None:
        assert self.grid is not None
        self._hooks, self._began_at = GridHooks(layers, self.grid), step
        self._taught.begin(model, self._hooks)
        self._cooldown.begin(self._start.total - step)

    def _to_come(self, history: RouterNormHistory | None) -> PlanToCome:
        return PlanToCome(self.settings, self._start.first, history, self._recorder)

    def _part(self, whole: nn.Module) -> nn.Module:
        return self._trained.of(whole, self._patterns())  # what is annealed of what a Trainer has

    def _patterns(self) -> Patterns:
        return self.settings.patterns if self.plan is None else self.plan.patterns

    def _begin(self, model: nn.Module, optimizers: Iterable[Any], history: RouterNormHistory | None, step: int) -> None:
        """Makes the plan if there is none, fixes the grid, and puts it into every forward pass.

        Where codes are rounded under statistics, the weights are moved onto them: from where they were, those that
        rounding has given another code would go back to the nearest.
        """
        layers = find_moe_layers(model, **self._patterns())
        self._taught.take(model)
        begins_with_it = self._start.first == 0  # with the weights that files beside the plan are of
        statistics = self._statistics.finish()
        if begins_with_it and self._statistics.asked:
            statistics = self._beside.statistics(layers)
        try:
            curvature: Curvature | None = curvature_of(layers, optimizers)
        except CurvatureError as error:
            curvature = self._beside.curvature(layers) if begins_with_it else None
            if curvature is None:
                rank_zero_info(f"{type(self).__name__}: the grid is fitted without curvature: {error}")
        if self.plan is None:
            prices = self.settings.method == AUTO or reads(self.settings.method, "curvature")
            self.plan = make_plan(self.settings, model, history, curvature, statistics if prices else None)
        self.plan = self._start.begin(self.plan, step, self._taught.digest)
        self.grid = Grid.fit(layers, self.plan, curvature, statistics, place=put_bank if statistics else None)
        self._taught.keep(self.grid, self._files)
        self._put_on_grid(model, layers, step)
        bits = f"{self.plan.average_bits:.3g} bits on average"
        rank_zero_info(f"{type(self).__name__}: from step {step} on the experts are trained at {bits}")

    def _before_step(
        self,
        model: nn.Module,
        optimizers: Iterable[Any],
        history: RouterNormHistory | None,
        step: int,
        logged: bool,
    ) -> None:
        """Begins annealing when it is time, and keeps the codes before a step that will be logged.

        Called again before the other micro-batches of a step.
        """
        if self._start.is_due(step):
            layers = find_moe_layers(model, **self._patterns())
            self._start.find(model, layers, step, self.plan or self.settings)
            self._statistics.move(step, self._start.first)
        if self._hooks is None and step >= self._start.first:
            self._begin(model, optimizers, history, step)
        if self._hooks is not None:
            self._cooldown.before_step(optimizers, step - self._start.first, self._start.total - self._start.first)
        self._statistics.before_batch(step)
        self._taught.before_step(logged)
        if self._hooks is None and not self._checked and step > self._started_at:
            self._checked = True
            if self.plan is None:
                layers = find_moe_layers(model, **self._patterns())
                self._to_come(history).check_after_a_step(layers, optimizers)
        if self._hooks is not None and logged:
            self._flips.look(self._hooks)

    def _after_step(self, step: int) -> None:
        """After the first annealed steps: checks that every layer has gone through the grid."""
        if self._hooks is not None and not self._used and step > self._began_at:
            self._used = self._hooks.check_used(step - self._began_at)
            self._taught.after_step()
        if self._hooks is not None:
            self._cooldown.check_used(step - self._began_at)

    def _metrics(self) -> dict[str, float]:
        """What to log for a step."""
        metrics = {"anneal/active": float(self._hooks is not None)}
        if self._hooks is not None and (share := self._flips.share(self._hooks)) is not None:
            metrics["anneal/flips"] = share
        return metrics | self._taught.metrics() | self._cooldown.metrics()

    def _finish(self, writes: bool, step: int) -> None:
        """Moves the weights onto the grid; writes plan and grid.

        A full disk does not stop the run, whose other callbacks may still save the model: see `RunFiles`.
        """
        if self._hooks is None or self.grid is None or self.plan is None:
            self.close()  # it may have ended among the recorded steps
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {step}, before annealing began at {self._start.first}: "
                "the weights are not on a grid, and no plan is written"
            )
            return
        self._seen.settle(self._hooks)
        self.close()
        if not writes or not self._files.written:
            return
        paths = self._files.paths
        if self._files.write(self.grid.save, paths.grid) and self._files.write(self.plan.save, paths.plan):
            self._taught.remove(self._files)
            bits = f"{self.plan.average_bits:.3g} bits on average"
            rank_zero_info(f"{type(self).__name__}: wrote {paths.plan} ({bits}) and its grid")

    def _finish_late(self, model: nn.Module, writes: bool, step: int) -> None:
        """`_finish`, for a run that had ended before this start: its grid is from the checkpoint."""
        assert self.grid is not None
        self._hooks = GridHooks(find_moe_layers(model, **self._patterns()), self.grid)
        self._finish(writes, step)

    def close(self) -> None:
        """Gives the model its float weights back after an interruption; a second call does nothing."""
        self._start.close()
        self._statistics.close()
        self._taught.close()
        self._cooldown.close()
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None
