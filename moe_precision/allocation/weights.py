"""Where the trained weights are, in memory or in a checkpoint: found once, measured once, only what a method reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from ..checkpoints.reading import costs_of_checkpoint, signals_of_checkpoint
from ..layers.module_tree import root_model
from ..layers.moe_layers import find_moe_layers
from ..layers.patterns import Patterns
from ..plans.plan import model_type_of
from ..recording.curvature import Curvature
from ..recording.router_norms import max_variances, norms_by_layer
from .costs import Costs, expert_costs
from .snapshot import Snapshot


class Weights(Protocol):
    """The weights of a trained model."""

    def snapshot(self, variance: bool) -> Snapshot:
        """Router norms, and the variances of the experts if asked for."""

    def costs(self, widths: Sequence[int], group_size: int, curvature: Curvature | None) -> Costs:
        """What each width costs each expert matrix, as `expert_costs`."""


class LiveWeights:
    """The weights of a model in memory; reading is a collective where they are sharded.

    Attributes:
        layers: Its Mixture-of-Experts layers.
    """

    def __init__(self, model: nn.Module, patterns: Patterns) -> None:
        self._patterns = patterns
        self._model_type = model_type_of(root_model(model))
        self.layers = find_moe_layers(model, **patterns)

    def snapshot(self, variance: bool) -> Snapshot:
        """Router norms, and the variances of the experts if asked for."""
        return Snapshot(
            model_type=self._model_type,
            layers={layer.name: layer.shape for layer in self.layers},
            router_norms=norms_by_layer(self.layers),
            max_variance={layer.name: max_variances(layer) for layer in self.layers} if variance else {},
            caveats={layer.name: layer.caveat for layer in self.layers if layer.caveat},
            patterns=self._patterns,
        )

    def costs(self, widths: Sequence[int], group_size: int, curvature: Curvature | None) -> Costs:
        """What each width costs each expert matrix, as `expert_costs`."""
        return expert_costs(self.layers, widths, group_size, curvature)


class StoredWeights:
    """The weights of a checkpoint folder, read one tensor at a time; no model is built."""

    def __init__(self, folder: str | os.PathLike[str], patterns: Patterns) -> None:
        self._folder, self._patterns = Path(folder), patterns

    def snapshot(self, variance: bool) -> Snapshot:
        """Router norms, and the variances of the experts if asked for."""
        history = signals_of_checkpoint(self._folder, variance, self._patterns)
        return Snapshot(
            model_type=history.model_type,
            layers=history.layers,
            router_norms=history.last,
            max_variance=history.max_variance,
            caveats=history.caveats,
            patterns=history.patterns,
        )

    def costs(self, widths: Sequence[int], group_size: int, curvature: Curvature | None) -> Costs:
        """What each width costs each expert matrix, as `expert_costs`."""
        return costs_of_checkpoint(self._folder, widths, group_size, curvature, self._patterns)
