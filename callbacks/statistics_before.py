"""Expert statistics that annealing begins with: of the training steps before it."""

from __future__ import annotations

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from moe_precision.callbacks.statistics_recorder import AUTOMATIC_BYTES
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.collector import check_visible
from moe_precision.recording.in_turn import StatisticsInTurn
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError, file_bytes

LEAST, SHARE = 32, 20  # where nothing is said: a twentieth of the steps before annealing, and at least so many


class StatisticsBefore:
    """Records the last steps before annealing, two layers at a time.

    Args:
        owner: Name of the callback, for messages.
        steps: How many; 0 for none; None for a twentieth of those before annealing, at least 32, where that costs
            little.

    Raises:
        ValueError: It is negative.
    """

    def __init__(self, owner: str, steps: int | None) -> None:
        if steps is not None and steps < 0:
            raise ValueError(f"statistics_steps must be at least 0 or None, got {steps}")
        self._owner, self._asked = owner, steps
        self._turns: StatisticsInTurn | None = None
        self._needed = ""

    def start(
        self, model: nn.Module, layers: list[MoELayer], step: int, first_step: int, obstacle: str, needed: str
    ) -> None:
        """Before the first step.

        Args:
            model: The model, or what is around it.
            layers: Its layers.
            step: Steps taken so far.
            first_step: Steps taken when annealing begins.
            obstacle: Why this run's steps cannot be recorded, if they cannot.
            needed: What cannot do without statistics, if anything.

        Raises:
            StatisticsError: What was asked for, or is needed, cannot be recorded.
        """
        self.close()
        self._needed = needed
        if self._asked == 0:
            return
        count = max(LEAST, first_step // SHARE) if self._asked is None else self._asked
        first = max(step, first_step - count)
        if reason := self._why_not(layers, first, first_step, obstacle):
            if needed or self._asked:
                what = needed or f"statistics_steps={self._asked}"
                raise StatisticsError(f"{what} needs expert statistics of the steps before annealing, and {reason}")
            if first_step > 0:
                rank_zero_info(f"{self._owner}: annealing will begin without expert statistics: {reason}")
            return
        self._turns = StatisticsInTurn(model, layers, first, first_step)
        rank_zero_info(
            f"{self._owner}: steps {first:,} to {first_step:,} are recorded for the experts' statistics, a few layers "
            f"at a time; they take up to {file_bytes(layers) / 1e6:,.1f} MB of memory"
        )

    def _why_not(self, layers: list[MoELayer], first: int, first_step: int, obstacle: str) -> str:
        if first >= first_step:
            return f"no step is left before step {first_step:,}"
        if obstacle:
            return obstacle
        if self._asked is None and (size := file_bytes(layers)) > AUTOMATIC_BYTES:
            return f"they would take {size / 1e9:,.1f} GB of memory. Ask for them with statistics_steps={LEAST}"
        try:
            check_visible(layers)
        except StatisticsError as error:
            return str(error)
        return ""

    def before_batch(self, step: int) -> None:
        """Before a forward pass of training, after ``step`` optimizer steps."""
        if self._turns is not None:
            self._turns.before_batch(step)

    def after_batch(self, step: int) -> None:
        """After it and its backward pass; a collective."""
        if self._turns is not None:
            self._turns.after_batch(step)

    def finish(self) -> ExpertStatistics | None:
        """When annealing begins: the statistics, or None, with the reason in the log; a collective.

        Raises:
            Exception: What a hook has raised, if statistics are needed.
        """
        turns, self._turns = self._turns, None
        if turns is None:
            return None
        try:
            found = turns.finish()
        except Exception as error:
            if self._needed:
                raise
            reason = str(error) if isinstance(error, StatisticsError) else f"{type(error).__name__}: {error}"
            rank_zero_info(f"{self._owner}: annealing begins without expert statistics: {reason}")
            return None
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
