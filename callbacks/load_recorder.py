"""What every expert received in a run, and in its last validation: counted for a history, and for loggers."""

from __future__ import annotations

from torch import nn

from moe_precision.layers.moe_layers import MoELayer
from moe_precision.plans.methods import MethodName, reads
from moe_precision.plans.numbers import AllocationError
from moe_precision.recording.history import RouterNormHistory, load_metrics
from moe_precision.recording.loads import LoadCounter, Loads


class LoadRecorder:
    """Counts into the history of a run; `count` and `count_validation` are collectives, called on all ranks."""

    def __init__(self) -> None:
        self._counter: LoadCounter | None = None
        self._history = RouterNormHistory()
        self._logged: Loads = {}  # tokens so far, at the last log

    def start(self, layers: list[MoELayer], history: RouterNormHistory, model: nn.Module) -> None:
        """Begins to count, on top of what the history has already."""
        self.stop()
        self._counter, self._history = LoadCounter(layers, model), history
        self._logged = dict(history.loads.get("training", {}))

    def stop(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        if self._counter is not None:
            self._counter.close()
            self._counter = None

    def counts_as(self, training: bool) -> None:
        """Says whether the forward passes that follow are training, or outside of it and maybe a validation."""
        if self._counter is not None:
            self._counter.training = training
            if not training:
                self._counter.forget_validation()

    def count(self) -> None:
        """Adds the tokens of training since the last call."""
        if self._counter is not None:
            self._history.add_load(self._counter.take(training=True))

    def count_validation(self) -> None:
        """Keeps the tokens of the validation run that has just ended."""
        if self._counter is not None and (loads := self._counter.take(training=False)):
            self._history.loads["validation"] = loads

    def check_seen(self, method: MethodName) -> None:
        """After a step: checks that a method that needs loads can have them, which only a forward pass shows.

        Raises:
            AllocationError: The experts of a layer were called in a way that shows nothing.
        """
        if self._counter is not None and reads(method, "load") and (unseen := sorted(self._counter.unseen)):
            raise AllocationError(
                f"method {method!r} needs the tokens of every expert, and the experts of {unseen[0]!r} are called with "
                "neither the indices nor a mask of the chosen ones: choose another method"
            )

    def metrics(self) -> dict[str, float]:
        """For a logger: how the tokens since the last call were spread."""
        before, self._logged = self._logged, dict(self._history.loads.get("training", {}))
        return load_metrics(before, self._logged, list(self._history.layers))
