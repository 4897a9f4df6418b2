"""Curvature and statistics beside a plan that was given, for annealing that begins with the weights they are of."""

from __future__ import annotations

import os
from typing import Any

from pytorch_lightning.utilities import rank_zero_info

from moe_precision.layers.moe_layers import MoELayer
from moe_precision.plans.beside import existing
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.router_norms import norms_by_layer
from moe_precision.recording.statistics import ExpertStatistics


class FilesBeside:
    """The files beside a plan's path, read each time they are asked for.

    Args:
        owner: Name of the callback, for messages.
        plan: A path; anything else has no files.

    Attributes:
        has_statistics: There is a file of statistics.
    """

    def __init__(self, owner: str, plan: Any) -> None:
        path = plan if isinstance(plan, (str, os.PathLike)) else None
        self._owner = owner
        self._curvature, self._statistics = existing("curvature", path), existing("statistics", path)

    @property
    def has_statistics(self) -> bool:
        return self._statistics is not None and self._statistics.is_file()

    def check(self, layers: list[MoELayer]) -> None:
        """Raises `CurvatureError` or `StatisticsError` if a file is of other weights than those of the layers now."""
        norms = norms_by_layer(layers)
        for found in (self.curvature(layers), self.statistics(layers)):
            if found is not None:
                found.check_router_norms(norms)

    def curvature(self, layers: list[MoELayer]) -> Curvature | None:
        """The curvature, in the names of the layers."""
        if self._curvature is None or not self._curvature.is_file():
            return None
        rank_zero_info(f"{self._owner}: the grid is fitted with the curvature of {self._curvature}")
        return Curvature.load(self._curvature).for_layers({layer.name: layer.shape for layer in layers})

    def statistics(self, layers: list[MoELayer]) -> ExpertStatistics | None:
        """The statistics, in the names of the layers."""
        if self._statistics is None or not self._statistics.is_file():
            return None
        rank_zero_info(f"{self._owner}: codes are rounded under the statistics of {self._statistics}")
        return ExpertStatistics.load(self._statistics).for_layers({layer.name: layer.shape for layer in layers})
