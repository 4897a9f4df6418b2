"""Expert statistics that annealing begins with: of the training steps before it."""

from __future__ import annotations

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.collector import check_visible
from moe_precision.recording.in_turn import StatisticsInTurn
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError, file_bytes


class StatisticsBefore:
    """Records the last steps before annealing, two layers at a time.

    Args:
        owner: Name of the callback, for messages.
        steps: How many; 0 for none.

    Raises:
        ValueError: It is negative.
    """

    def __init__(self, owner: str, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"statistics_steps must be at least 0, got {steps}")
        self._owner, self._asked = owner, steps
        self._turns: StatisticsInTurn | None = None

    @property
    def asked(self) -> bool:
        """Whether annealing is to begin with statistics."""
        return self._asked > 0

    def start(self, model: nn.Module, layers: list[MoELayer], step: int, first_step: int, obstacle: str) -> None:
        """Before the first step.

        Args:
            model: The model, or what is around it.
            layers: Its layers.
            step: Steps taken so far.
            first_step: Steps taken when annealing begins.
            obstacle: Why this run's steps cannot be recorded, if they cannot.

        Raises:
            StatisticsError: What was asked for cannot be recorded.
        """
        self.close()
        if not self.asked:
            return
        first = max(step, first_step - self._asked)
        if reason := _why_not(layers, first, first_step, obstacle):
            raise StatisticsError(f"statistics_steps={self._asked} records the steps before annealing, and {reason}")
        self._of = model, layers, obstacle
        self._turns = StatisticsInTurn(model, layers, first, first_step)
        rank_zero_info(
            f"{self._owner}: steps {first:,} to {first_step:,} are recorded for the experts' statistics, a few layers "
            f"at a time; they take up to {file_bytes(layers) / 1e6:,.1f} MB of memory"
        )

    def move(self, step: int, first_step: int) -> None:
        """Annealing will begin at another step than `start` was told, which has been called."""
        if self._turns is not None:
            model, layers, obstacle = self._of
            self.start(model, layers, step, first_step, obstacle)

    def before_batch(self, step: int) -> None:
        """Before a forward pass of training, after ``step`` optimizer steps."""
        if self._turns is not None:
            self._turns.before_batch(step)

    def after_batch(self, step: int) -> None:
        """After it and its backward pass; a collective."""
        if self._turns is not None:
            self._turns.after_batch(step)

    def finish(self) -> ExpertStatistics | None:
        """When annealing begins: the statistics, or None where none were asked for; a collective.

        Raises:
            Exception: What a hook has raised.
        """
        turns, self._turns = self._turns, None
        if turns is None:
            return None
        try:
            found = turns.finish()
        finally:
            turns.close()
        found.text = "the training steps before annealing"
        rank_zero_info(f"{self._owner}: statistics of {found.text}; {found.described()}")
        return found

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        if self._turns is not None:
            self._turns.close()
            self._turns = None


def _why_not(layers: list[MoELayer], first: int, first_step: int, obstacle: str) -> str:
    """Why they cannot be recorded; empty if they can."""
    if first >= first_step:
        return f"no step is left before step {first_step:,}: resume from an earlier checkpoint, or take a later start"
    if obstacle:
        return obstacle
    try:
        check_visible(layers)
    except StatisticsError as error:
        return str(error)
    return ""
