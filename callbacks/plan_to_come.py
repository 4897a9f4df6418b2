"""Whether an annealing callback will be able to make its plan: checked before training, and once more after a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from moe_precision.annealing.covers import AnnealError
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.plans.methods import AUTO, reads
from moe_precision.plans.settings import PlanSettings
from moe_precision.recording.curvature import CurvatureError
from moe_precision.recording.history import RouterNormHistory
from moe_precision.recording.optimizer_check import check_second_moments
from moe_precision.recording.second_moments import curvature_of


class PlanToCome:
    """A plan that will be made when annealing begins.

    Args:
        settings: What is asked for.
        first_step: When annealing begins.
        history: Of the callback that records router norms, if there is one.
        recorder: Name of that callback, for messages.
    """

    def __init__(
        self, settings: PlanSettings, first_step: int, history: RouterNormHistory | None, recorder: str
    ) -> None:
        self._settings, self._method, self._first_step = settings, settings.method, first_step
        self._history, self._recorder = history, recorder

    def check(self, layers: list[MoELayer], optimizers: Sequence[Any]) -> None:
        """Before training.

        Args:
            layers: Of the model.
            optimizers: That train it.

        Raises:
            AnnealError: What the method reads will not be there.
            CurvatureError: The method reads second moments, and these optimizers keep none.
            AllocationError: ``auto`` has the paper's rule alone, which cannot make a plan as it is asked.
        """
        if self._history is None and reads(self._method, "norm_change", "load"):
            raise AnnealError(f"method {self._method!r} reads what {self._recorder} records: add it too")
        if reads(self._method, "curvature"):
            check_second_moments(layers, optimizers)
            if self._first_step == 0:
                raise AnnealError(
                    "with start=0 the optimizer has no second moments to make a plan from: give the plan of an earlier "
                    "run (plan=...), another method, or a later start"
                )
        if self._method == AUTO:
            try:
                if self._first_step == 0:
                    raise CurvatureError("with start=0 the optimizer has no second moments when the plan is made")
                check_second_moments(layers, optimizers)
            except CurvatureError as error:
                self._check_without_curvature(layers, error)
                rank_zero_warn(f"the plan will be by the paper's rule, since there will be no curvature: {error}")

    def check_after_a_step(self, layers: list[MoELayer], optimizers: Iterable[Any]) -> None:
        """Once the optimizers have a state.

        Raises:
            AnnealError: It is not what the method reads.
            AllocationError: As in `check`.
        """
        if self._method != AUTO and not reads(self._method, "curvature"):
            return
        try:
            curvature_of(layers, optimizers)
        except CurvatureError as error:
            if self._method != AUTO:
                raise AnnealError(
                    f"method {self._method!r} cannot make a plan at step {self._first_step}: {error}"
                ) from error
            self._check_without_curvature(layers, error)

    def _check_without_curvature(self, layers: list[MoELayer], error: CurvatureError) -> None:
        """Raises unless ``auto`` can make its plan by the paper's rule."""
        if self._history is None:
            raise AnnealError(
                f"method 'auto' has neither curvature nor what {self._recorder} records to make a plan from: add that "
                f"callback, or give a plan (plan=...). There is no curvature: {error}"
            ) from error
        self._settings.resolved("router_norm", {layer.name: layer.shape for layer in layers})
