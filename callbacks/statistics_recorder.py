"""When a recording callback collects the experts' statistics: in the last steps of training, after them, or never."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.collecting import collect_from_steps, peak_bytes
from moe_precision.recording.collector import check_visible
from moe_precision.recording.in_turn import StatisticsInTurn, most_bytes
from moe_precision.recording.processes import processes_per_batch, world_size
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError, file_bytes

AUTOMATIC = 32  # batches where nothing is said
AUTOMATIC_BYTES = 10**9  # of the file, up to which statistics are collected unasked

Step = Callable[[], object]  # the forward pass of one batch


class Again:
    """An iterable that begins anew each time it is gone through.

    Args:
        begin: Gives an iterator.
    """

    def __init__(self, begin: Callable[[], Iterator[Step]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Step]:
        return self._begin()


class StatisticsRecorder:
    """Says before training what statistics will take, and collects them; a failure leaves the run and its plan alone.

    Args:
        owner: Name of the callback, for messages.
        batches: Training batches after the last step; 0 for none; None for `AUTOMATIC` where that costs little.
        share: Share of training after which its own steps are recorded instead.

    Raises:
        ValueError: A value that is out of range, or both ways at once.
    """

    def __init__(self, owner: str, batches: int | None, share: float | None) -> None:
        if batches is not None and batches < 0:
            raise ValueError(f"statistics_batches must be at least 0 or None, got {batches}")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"statistics_from must be a share of training between 0 and 1, got {share}")
        if batches and share is not None:
            raise ValueError(
                f"statistics_batches={batches} and statistics_from={share} are two ways to collect the same; give one"
            )
        self._owner, self._asked, self._share = owner, batches, share
        self._batches = 0  # of this run
        self._turns: StatisticsInTurn | None = None

    def start(
        self,
        model: nn.Module,
        layers: list[MoELayer],
        step: int,
        total: float,
        folder: Path | None,
        obstacle: str,
        needed: str = "",
    ) -> None:
        """Before the first step.

        Args:
            model: The model, or what is around it.
            layers: Its layers.
            step: Steps taken so far.
            total: Steps taken when training ends; infinite or not positive if nobody knows.
            folder: Where the file goes; None for a run that writes none.
            obstacle: Why this run can run no batch without a step, if it cannot.
            needed: What cannot do without statistics, if anything: the method, for one.

        Raises:
            ValueError: What was asked for, or is needed, cannot be done in this run.
            StatisticsError: No hook can see the inputs of some experts, or one layer takes too much memory.
        """
        self.close()
        self._batches = 0
        size = file_bytes(layers)
        if self._share is not None:
            self._start_turns(model, layers, step, total, obstacle)
        elif self._asked is None:
            if folder is None:  # a trial run, which writes no files
                return
            if reason := _why_not(layers, size, folder, obstacle):
                if needed:
                    raise ValueError(f"{needed} needs expert statistics, and none are collected: {reason}")
                rank_zero_info(f"{self._owner}: no expert statistics are collected: {reason}")
                return
            self._batches = AUTOMATIC
        elif self._asked:
            if obstacle:
                raise ValueError(f"statistics_batches={self._asked} {obstacle}")
            check_visible(layers)
            self._batches = self._asked
        if self._batches:
            rank_zero_info(
                f"{self._owner}: after the last step, {self._batches} training batches run for the experts' "
                f"statistics, which take {peak_bytes(layers) / 1e6:,.1f} MB of memory and a file of "
                f"{size / 1e6:,.1f} MB (statistics_batches=0 leaves them out)"
            )
        if (self._batches or self._turns is not None) and folder is not None and (free := _free(folder)) < size:
            rank_zero_warn(
                f"{self._owner}: the statistics take a file of {size / 1e6:,.1f} MB, and {str(folder)!r} has "
                f"{free / 1e6:,.1f} MB left. Make room before training ends"
            )

    def _start_turns(self, model: nn.Module, layers: list[MoELayer], step: int, total: float, obstacle: str) -> None:
        assert self._share is not None
        if obstacle:
            raise ValueError(f"statistics_from={self._share} {obstacle}")
        if not 0 < total < float("inf"):
            raise ValueError(
                f"statistics_from={self._share} is a share of all steps, and this run does not say how many it takes: "
                "set max_steps, or collect after the last step (statistics_batches=32)"
            )
        if step >= total:
            return
        first, last = max(step, int(self._share * total)), int(total)
        self._turns = StatisticsInTurn(model, layers, first, last)
        rank_zero_info(
            f"{self._owner}: steps {first:,} to {last:,} are recorded for the experts' statistics, a few layers at a "
            f"time; they take {most_bytes(layers, first, last) / 1e6:,.1f} MB of memory while they are summed, and "
            f"{file_bytes(layers) / 1e6:,.1f} MB of memory and disk in the end"
        )

    def before_batch(self, step: int) -> None:
        """Before a forward pass of training, after ``step`` optimizer steps."""
        if self._turns is not None:
            self._turns.before_batch(step)

    def after_batch(self, step: int) -> None:
        """After it and its backward pass; a collective."""
        if self._turns is not None:
            self._turns.after_batch(step)

    def finish(self, model: nn.Module, layers: list[MoELayer], steps: Iterable[Step]) -> ExpertStatistics | None:
        """After the last step: the statistics, or None, with the reason in a warning; a collective.

        Args:
            model: The model, or what is around it; it stays as it is.
            layers: Its layers.
            steps: Forward passes of training batches, anew each time it is gone through.
        """
        if self._turns is None and not self._batches:
            return None
        with isolate_rng():  # restores nothing if an exception passes through it
            return self._collected(model, layers, steps)

    def _collected(self, model: nn.Module, layers: list[MoELayer], steps: Iterable[Step]) -> ExpertStatistics | None:
        turns = self._turns
        try:
            found = self._after_the_last_step(model, layers, steps) if turns is None else turns.finish()
        except Exception as error:  # whatever a training step raises here, the plan is still to be written
            reason = str(error) if isinstance(error, StatisticsError) else f"{type(error).__name__}: {error}"
            rank_zero_warn(f"{self._owner}: no statistics are written: {reason}")
            return None
        finally:
            self.close()
        if turns is not None and turns.weights_changed:
            found.text += ", whose weights were changed after the last step"
            rank_zero_warn(
                f"{self._owner}: the weights were changed after the last step, and the experts' statistics are those "
                "of the steps before. If the final weights are far from these, collect statistics from the checkpoint"
            )
        rank_zero_info(f"{self._owner}: statistics of {found.text}; {found.described()}")
        return found

    def _after_the_last_step(self, model: nn.Module, layers: list[MoELayer], steps: Iterable[Step]) -> ExpertStatistics:
        taken = 0

        def counted() -> Iterator[Step]:
            nonlocal taken
            taken = 0
            for step in islice(steps, self._batches):
                taken += 1
                yield step

        found = collect_from_steps(model, layers, Again(counted))
        if taken < self._batches and self._asked is not None:
            rank_zero_warn(f"{self._owner}: there are {taken} batches to take statistics from, of {self._batches}.")
        batches = taken * world_size() // processes_per_batch(model)
        found.text = f"{batches} training batches of the run that the plan is of"
        return found

    def calibrating(self, steps: Iterable[Step]) -> Iterable[Step] | None:
        """The forward passes, if costs may be calibrated on them: not where no statistics are collected."""
        return steps if self._batches or self._share is not None else None

    def close(self) -> None:
        """Takes the hooks off, for good; a second call does nothing."""
        self._batches = 0
        if self._turns is not None:
            self._turns.close()
            self._turns = None


def _why_not(layers: list[MoELayer], size: int, folder: Path, obstacle: str) -> str:
    """Why statistics are not collected unasked; empty if they are."""
    ask = f"Ask for them with statistics_batches={AUTOMATIC} or statistics_from=0.95"
    if size > AUTOMATIC_BYTES:
        return f"their file would take {size / 1e9:,.1f} GB. {ask}"
    if _free(folder) < size:
        return f"their file would take {size / 1e6:,.1f} MB, and {str(folder)!r} has {_free(folder) / 1e6:,.1f} MB left"
    if obstacle:
        return f"that {obstacle}"
    try:
        check_visible(layers)
        peak_bytes(layers)
    except StatisticsError as error:
        return str(error)
    return ""


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
