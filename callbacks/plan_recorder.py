"""What the callbacks share: finding the layers, recording their router norms, and the plan at the end. No trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from moe_precision.allocation.planning import caveat_text
from moe_precision.allocation.whole_model import with_rest
from moe_precision.callbacks.end_logging import EndLogging
from moe_precision.callbacks.extra_batches import Gradients, Loss, curvature_of_run
from moe_precision.callbacks.load_recorder import LoadRecorder
from moe_precision.callbacks.plan_of_run import check_run, plan_of_run
from moe_precision.callbacks.restored import check_restored
from moe_precision.callbacks.run_files import RunFiles
from moe_precision.callbacks.scale_distiller import ScaleDistiller
from moe_precision.callbacks.statistics_recorder import StatisticsRecorder, Step
from moe_precision.callbacks.trained_part import trained_part
from moe_precision.callbacks.weights_seen import WeightsSeen
from moe_precision.layers.module_tree import root_model
from moe_precision.layers.moe_layers import MoELayer, find_moe_layers
from moe_precision.plans.methods import AUTO, MethodName, reads
from moe_precision.plans.plan import PrecisionPlan, model_type_of
from moe_precision.plans.settings import MAX_DROPPED, MIN_TOKENS, ZETA, PlanSettings
from moe_precision.plans.widths import Granularity
from moe_precision.present.metrics import plan_metrics
from moe_precision.present.tables import as_text, layers_table
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.expert_samples import ExpertSamples
from moe_precision.recording.gradients import left_as_it_is
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.masters import Masters
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.statistics import ExpertStatistics

_RESCUE = "The router norms are still in callback.history, which history.save(path) writes, and in checkpoints"
EXPERT_KEYS = 4096  # more curves than this are left out unless asked for: W&B slows down at 10,000 keys


class PlanRecorder:
    """What a callback inherits in addition to its trainer's base class; arguments as in `RouterNormMonitor`.

    Reading is a collective under FSDP and ZeRO-3: `_start`, `_record` and `_finish` are called on all ranks.

    Attributes:
        settings: What is asked for.
        history: The recorded norms.
        curvature: Means of the optimizer's second moments, once training has ended, if it has any.
        statistics: Of the experts' inputs, once training has ended, if they were asked for.
        grid: Codes and distilled scales, once training has ended, if they were asked for.
        plan: The plan, once training has ended.
    """

    def __init__(
        self,
        *,
        method: MethodName = AUTO,
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
        router_pattern: str | None = None,
        expert_pattern: str | None = None,
        layout: str | None = None,
        module: str | None = None,
        every_n_steps: int | None = None,
        export_to: str = "precision_plan.json",
        log_experts: bool | None = None,
        curvature_batches: int | None = None,
        statistics_batches: int | None = None,
        statistics_from: float | None = None,
        distill_steps: int = 0,
    ) -> None:
        self.settings = PlanSettings.among(locals())
        self.settings.check_plannable()
        for name, value in (("every_n_steps", every_n_steps), ("curvature_batches", curvature_batches)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        self._files = RunFiles(export_to, type(self).__name__, _RESCUE)
        self.every_n_steps, self.export_to, self.log_experts = every_n_steps, export_to, log_experts
        self.module, self.curvature_batches, self.distill_steps = module, curvature_batches, distill_steps
        self._collecting = StatisticsRecorder(type(self).__name__, statistics_batches, statistics_from)
        self._distilling = ScaleDistiller(type(self).__name__, distill_steps)
        self._needing = f"method {method!r}" if reads(method, "statistics") else self._distilling.needs  # statistics
        self._needing = "0 among the levels" if self.settings.may_drop else self._needing
        if self._needing and statistics_batches == 0 and statistics_from is None:
            raise ValueError(f"{self._needing} needs expert statistics, and statistics_batches=0 collects none")
        self.history = RouterNormHistory()
        self.curvature: Curvature | None = None
        self.statistics: ExpertStatistics | None = None
        self.grid: Grid | None = None
        self.plan: PrecisionPlan | None = None
        self._whole: nn.Module | None = None  # what the Trainer has
        self._model: nn.Module | None = None  # the part of it that is recorded
        self._layers: list[MoELayer] = []
        self._experts = ExpertSamples()  # of the checkpoint that a run resumes from
        self._loads = LoadRecorder()
        self._warned = False
        self._masters, self._gradients = Masters(), Gradients(curvature_batches)
        self._seen = WeightsSeen()  # at the end
        self._ending = EndLogging(type(self).__name__)

    def _prepare(self, folder: str | None, anew: bool) -> None:
        """Before training: where the plan goes, checked to be writable; None for a run that writes nothing.

        Args:
            folder: What ``export_to`` is relative to.
            anew: Training starts at step 0, so what another run recorded does not count.
        """
        self._layers, self._warned = [], False
        self._loads.stop()
        self._collecting.close()
        self._distilling.close()
        self.plan = self.curvature = self.statistics = self.grid = None
        if anew:
            self.history, self._experts = RouterNormHistory(), ExpertSamples()
        self._files.prepare(folder)

    def _start(
        self,
        model: nn.Module,
        step: int,
        total: float = float("inf"),
        obstacle: str = "",
        optimizers: Sequence[Any] = (),
    ) -> bool:
        """Finds the layers, reports what was found, and takes the baseline unless a checkpoint brought one.

        Arguments are those of `StatisticsRecorder.start`, and the optimizers, as far as they are known. Returns whether
        a record was taken.
        """
        fresh = self._find(model)
        model = self._model or model
        self._masters = Masters(self._layers, optimizers)
        self.settings = with_rest(self.settings, model)
        self.settings.check_fits(fresh.layers)
        rank_zero_info(f"{type(self).__name__}: recording\n{as_text(layers_table(self._layers))}")
        folder = self._files.folder
        self._gradients = check_run(self.settings, self._layers, optimizers, self.curvature_batches, obstacle)
        self._collecting.start(model, self._layers, step, total, folder, obstacle, self._needing)
        if folder is not None:
            self._distilling.start(model, self._layers, max(self.settings.levels), self.settings.group_size, obstacle)
        if fresh.caveats:
            rank_zero_warn(f"{type(self).__name__}: {caveat_text(fresh.caveats)}.")
        if self.history.steps and self.history.steps[-1] <= step:  # else it is from an earlier run
            check_restored(self.history, fresh, self._layers, step, type(self).__name__, optimizers, self._experts)
            self._experts = ExpertSamples()  # of that step: the model may be trained on in another call of `fit`
            self.history.caveats, self.history.patterns = fresh.caveats, fresh.patterns
            self.history.dtypes = fresh.dtypes
            self._loads.start(self._layers, self.history, model)
            return False
        self.history = fresh
        if step > 0:
            rank_zero_warn(
                f"{type(self).__name__}: training resumes at step {step} from a checkpoint without router norms for "
                f"export_to={self.export_to!r}. The change is measured from here, not from the start of training; "
                f'the plan will have "baseline": {{"step": {step}}}.'
            )
        recorded = self._record(step)
        self._loads.start(self._layers, self.history, model)
        return recorded

    def _find(self, whole: nn.Module) -> RouterNormHistory:
        """Finds the part that is recorded and its layers; an empty history of them."""
        patterns = self.settings.patterns
        self._whole, self._model = whole, trained_part(whole, self.module, patterns)
        self._layers = find_moe_layers(self._model, **patterns)
        return RouterNormHistory.of(self._layers, model_type_of(root_model(self._model)), patterns)

    def _start_late(self, model: nn.Module, step: int) -> None:
        """Instead of `_start`, for a run that had ended before this start: no batch is to come."""
        check_restored(self.history, self._find(model), self._layers, step, type(self).__name__, (), self._experts)
        self._distilling.start_late()

    def _due(self, step: int, default_every: int) -> bool:
        """Whether a multiple of the interval was crossed since the last record.

        Crossed, not hit: with two optimizers Lightning's ``global_step`` rises by two per batch.
        """
        every = self.every_n_steps or default_every
        return bool(every) and step // every > self.history.steps[-1] // every

    def _record(self, step: int) -> bool:
        """Reads all norms, unless this step has them already; returns whether it did."""
        self._loads.count()
        if self.history.steps and step <= self.history.steps[-1]:
            return False
        self.history.record(step, router_norms(self._layers))
        if news := self._masters.news():
            rank_zero_info(f"{type(self).__name__}: {news}")
        if not self._warned and (broken := self.history.not_finite(last_only=True)):
            self._warned = True
            rank_zero_warn(f"{type(self).__name__}: {broken}. Has training diverged? No plan can be made from these.")
        return True

    def _record_final(self, step: int) -> bool:
        """Takes the last record, of the weights as they are now, even if this step was recorded before they changed.

        Returns:
            Whether there is something new to log.
        """
        if self._record(step):
            return True
        if len(self.history.steps) < 2 or not self.history.replace_last(router_norms(self._layers)):
            return False
        rank_zero_warn(
            f"{type(self).__name__}: the weights were changed after the last step (weight averaging, or the best "
            f"checkpoint loaded at the end); the norms at step {step} and the plan are those of the final weights, "
            "and the second moments those of the last step."
        )
        return True

    def _metrics(self) -> dict[str, float]:
        """The last record for a logger, with up to `EXPERT_KEYS` experts one by one."""
        experts = sum(layer.num_experts for layer in self._layers)
        metrics = self.history.metrics(experts <= EXPERT_KEYS if self.log_experts is None else self.log_experts)
        return metrics | self._loads.metrics() | plan_metrics(self.history, self.settings)

    def _finish(
        self,
        writes: bool,
        optimizers: Sequence[Any],
        losses: Iterable[Loss] = (),
        steps: Iterable[Step] = (),
    ) -> PrecisionPlan | None:
        """Writes history, curvature, statistics, grid and plan; returns the plan if it was written.

        A full disk does not stop the run, whose other callbacks may still save the model: see `RunFiles`.

        Args:
            writes: Whether this rank writes files.
            optimizers: Those that trained the experts, for their second moments.
            losses: Losses of training batches, for squared gradients instead if `curvature_batches` is given.
            steps: Forward passes of training batches, for the experts' statistics.
        """
        self._loads.stop()
        if len(self.history.steps) < 2:
            rank_zero_warn(f"{type(self).__name__}: no plan is written, because no optimizer step was taken.")
            return None
        writes = writes and self._files.written
        if writes:
            self._save_history()  # whatever happens below, the record is kept
        self.history.measure_variance(self._layers)
        model, whole = self._model, self._whole
        assert model is not None and whole is not None  # noqa: PT018
        owner, gradients = type(self).__name__, self._gradients
        self.curvature = curvature_of_run(whole, self._layers, optimizers, losses, gradients, owner)
        calibrating = self._collecting.calibrating(steps)
        with left_as_it_is(whole):
            self.statistics = self._collecting.finish(model, self._layers, steps)
        if writes:
            for kind, found in (("curvature", self.curvature), ("statistics", self.statistics)):
                if found is not None:
                    self._files.write(found.save, getattr(self._files.paths, kind))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                recorded = self.history, self.curvature, self.statistics
                with left_as_it_is(whole):
                    self.plan = plan_of_run(self.settings, model, *recorded, calibrating)
        except ValueError as error:  # norms that are not finite, no second moments; other callbacks have work to do
            rank_zero_warn(f"{type(self).__name__}: no plan is written: {error}")
            return None
        for warning in caught:
            if issubclass(warning.category, DeprecationWarning | FutureWarning):
                continue  # between other packages, while costs are measured
            rank_zero_warn(f"{type(self).__name__}: {warning.message}")
        with left_as_it_is(whole):
            self.grid = self._distilling.finish(model, self._layers, self.plan, *recorded[1:], steps)
        if writes and self.grid is not None:
            self._files.write(self.grid.save, self._files.paths.grid)
        if not writes or not self._save_history() or not self._files.write(self.plan.save, self._files.paths.plan):
            return None
        path = self._files.paths.plan
        chosen = f", method {self.plan.method}: {self.plan.notes['auto']}" if "auto" in self.plan.notes else ""
        rank_zero_info(f"{type(self).__name__}: wrote {path} ({self.plan.average_bits:.3g} bits on average{chosen})")
        return self.plan

    def _save_history(self) -> bool:
        """Writes what was recorded, without any collective; returns whether that worked.

        A baseline alone is not written: no plan can be made from it, and an earlier run's files would be lost for it.
        """
        if not self._files.written or len(self.history.steps) < 2:
            return False
        self._files.clear()
        return self._files.write(self.history.save, self._files.paths.history)
