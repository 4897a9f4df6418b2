"""Curvature and statistics beside a plan that was given, for annealing that begins with the weights they are of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pytorch_lightning.utilities import rank_zero_info

from moe_precision.layers.moe_layers import MoELayer
from moe_precision.plans.beside import existing
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.router_norms import norms_by_layer
from moe_precision.recording.statistics import ExpertStatistics

Kind = TypeVar("Kind", Curvature, ExpertStatistics)


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

    def check(self, layers: list[MoELayer], statistics: bool) -> None:
        """Raises `CurvatureError` or `StatisticsError` if a file is of other weights than those of the layers now.

        Args:
            layers: Of the model.
            statistics: Whether the statistics will be used.
        """
        norms = norms_by_layer(layers)
        if (curvature := self._load(Curvature, self._curvature, layers)) is not None:
            curvature.check_router_norms(norms)
        if statistics and (found := self._load(ExpertStatistics, self._statistics, layers)) is not None:
            found.check_router_norms(norms)

    def curvature(self, layers: list[MoELayer]) -> Curvature | None:
        """The curvature, in the names of the layers."""
        found = self._load(Curvature, self._curvature, layers)
        if found is not None:
            rank_zero_info(f"{self._owner}: the grid is fitted with the curvature of {self._curvature}")
        return found

    def statistics(self, layers: list[MoELayer]) -> ExpertStatistics | None:
        """The statistics, in the names of the layers."""
        found = self._load(ExpertStatistics, self._statistics, layers)
        if found is not None:
            rank_zero_info(f"{self._owner}: codes are rounded under the statistics of {self._statistics}")
        return found

    @staticmethod
    def _load(kind: type[Kind], path: Path | None, layers: list[MoELayer]) -> Kind | None:
        if path is None or not path.is_file():
            return None
        return kind.load(path).for_layers({layer.name: layer.shape for layer in layers})
