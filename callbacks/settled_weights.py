"""The end of annealing: experts are moved onto their grid, with a warning where somebody else changes them."""

from __future__ import annotations

from pytorch_lightning.utilities import rank_zero_warn

from moe_precision.annealing.hooks import GridHooks
from moe_precision.callbacks.weights_seen import WeightsSeen
from moe_precision.layers.moe_layers import MoELayer


class SettledWeights(WeightsSeen):
    """Moves experts onto their grid when training ends, and warns of those who change them just before or after.

    Args:
        owner: Name of the callback, for messages.
    """

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._owner = owner
        self._settled: list[MoELayer] = []

    def settle(self, hooks: GridHooks) -> None:
        """Moves the weights onto the grid; a collective."""
        if self.changed(hooks.layers):
            rank_zero_warn(
                f"{self._owner}: the experts' weights were changed after the last step, by another callback (weight "
                "averaging, the best checkpoint): what is moved onto the grid is not what training ended on"
            )
        hooks.settle()
        self.look(hooks.layers)
        self._settled = hooks.layers

    def check_left(self) -> None:
        """After all callbacks are done: warns if the weights have left the grid."""
        if self._settled and self.changed(self._settled):
            rank_zero_warn(
                f"{self._owner}: the weights were changed after they had been moved onto the grid, by a later callback "
                "(weight averaging) or the module's on_train_end: quantizing them does not give what training ended on"
            )
        self._settled = []
