"""Expert statistics of training itself: of its last steps, two layers at a time, so that few are in memory at once.

Nothing is computed twice: hooks sum second moments in the forward passes of training. Each layer has its turn once, and
within its turn every k-th step counts, so that about `ENOUGH` tokens per input column are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.moe_layers import MoELayer
from .collecting import memory_bytes
from .collector import Collector, check_visible
from .processes import highest, world_size
from .router_norms import router_norms
from .statistics import ExpertStatistics, StatisticsError

ENOUGH = 32  # tokens per expert for each input column; more gain nothing
TOGETHER = 2  # layers that have their turn at the same time


@dataclass(frozen=True)
class Turn:
    """The steps at which some layers are recorded.

    Attributes:
        layers: Recorded together.
        first: The first step, counted from the steps that were taken before it.
        end: The first step after them.
    """

    layers: list[MoELayer]
    first: int
    end: int


def turns(layers: list[MoELayer], first: int, last: int) -> list[Turn]:
    """Shares out the steps ``first <= step < last`` to groups of `TOGETHER` layers, or larger ones if steps are few."""
    count = min(-(-len(layers) // TOGETHER), last - first)
    steps = [first + (last - first) * i // count for i in range(count + 1)]
    places = [len(layers) * i // count for i in range(count + 1)]
    return [Turn(layers[places[i] : places[i + 1]], steps[i], steps[i + 1]) for i in range(count)]


def most_bytes(layers: list[MoELayer], first: int, last: int) -> int:
    """Bytes of the second moments that are in memory together at most."""
    return max(memory_bytes(turn.layers) for turn in turns(layers, first, last))


def stride(rows: int, turn: Turn) -> int:
    """Every how many steps of a turn are enough, if one step gives this many rows to the experts of each layer."""
    widest = max(inp for layer in turn.layers for _, inp in layer.projections.values())
    enough = ENOUGH * widest * max(layer.num_experts for layer in turn.layers)
    return max(1, rows * (turn.end - turn.first) // enough)


class StatisticsInTurn:
    """Records the steps from ``first`` to ``last`` of a training run.

    With several processes `after_batch` and `finish` are collectives. A hook that fails stops the recording, never the
    training.

    Args:
        model: The model, or what is around it.
        layers: Its layers.
        first: Steps taken when recording begins.
        last: Steps taken when training ends.

    Attributes:
        weights_changed: Once finished: the weights are others than those after the last step (averaging, or a
            checkpoint loaded at the end).

    Raises:
        StatisticsError: Experts whose inputs no hook can see.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer], first: int, last: int) -> None:
        check_visible(layers)
        self._model, self._layers, self._first, self._last = model, layers, first, last
        self._turns = turns(layers, first, last)
        self._device = layers[0].router_is.parameter().device
        self._collector: Collector | None = None
        self._every = 0  # 0 until the first step of a turn has shown how many tokens it has
        self._found = ExpertStatistics({layer.name: layer.shape for layer in layers})
        self._error: Exception | None = None
        self._norms: Tensor | None = None  # of the routers, after the last step so far; in the last turn
        self.weights_changed = False

    def before_batch(self, step: int) -> None:
        """Before the forward pass of a batch, after ``step`` optimizer steps."""
        if self._error is not None or not self._turns or step < self._turns[0].first:
            return
        turn = self._turns[0]
        if self._collector is None:
            self._collector, self._every = Collector(self._model, turn.layers, raises=False), 0
        if self._collector.error is None:
            self._collector.active = self._every == 0 or (step - turn.first) % self._every == 0

    def after_batch(self, step: int) -> None:
        """After the backward pass of a batch, and after the optimizer's step if it took one; a collective."""
        if self._collector is None:
            return
        self._collector.active = False  # a validation may follow
        self._collector.forget_batch()
        turn = self._turns[0]
        if self._every == 0 and step > turn.first:
            self._every = stride(world_size() * self._collector.rows // (step - turn.first), turn)
        if len(self._turns) == 1:
            self._norms = router_norms(self._layers)
        if step >= turn.end:
            self._end_turn()

    def _end_turn(self) -> None:
        assert self._collector is not None
        collector = self._collector
        self._turns.pop(0)
        try:
            failed = highest(int(collector.error is not None), self._device)
            if failed:
                raise collector.error or StatisticsError("a hook failed on another process")
            collector.take(self._found)
        except Exception as error:
            self._error = error
        finally:
            self.close()

    def finish(self) -> ExpertStatistics:
        """The statistics, of the weights as they are now; a collective.

        Raises:
            StatisticsError: Training has ended before each layer had its turn, or what a hook has raised.
        """
        if self._collector is not None and highest(min(self._collector.rows, 1), self._device):
            self._end_turn()
        if self._error is not None:
            raise self._error
        if missing := [layer.name for turn in self._turns for layer in turn.layers]:
            raise StatisticsError(
                f"training ended before step {self._last}, and {len(missing)} of {len(self._layers)} layers had no "
                f"turn: {missing[0]!r}, ..."
            )
        tokens = torch.tensor([int(of_layer.sum()) for of_layer in self._found.tokens.values()]).median()
        share = 100 * (self._last - self._first) / self._last
        self._found.text = f"the last {share:.2g} % of training, {int(tokens):,} routed tokens per layer"
        if self._norms is not None:
            self.weights_changed = not torch.allclose(router_norms(self._layers), self._norms, rtol=1e-5, atol=0)
        return self._found.belongs_to(self._layers)

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        if self._collector is not None:
            self._collector.close()
            self._collector = None
