"""Files that stand beside a history but belong to other weights, such as those of the last step of its run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from ..allocation.weights import StoredWeights
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sources import StreamingError
from ..plans.beside import Kind, existing
from ..recording.curvature import Curvature, CurvatureError
from ..recording.history import RouterNormHistory
from ..recording.statistics import ExpertStatistics, StatisticsError

KINDS: tuple[Literal["curvature", "statistics"], ...] = ("curvature", "statistics")
_LOADS: dict[Kind, Callable[[Any], Curvature | ExpertStatistics]] = {
    "curvature": Curvature.load,
    "statistics": ExpertStatistics.load,
}


def beside_history(kinds: Iterable[Kind], history: str, checkpoint: str | None) -> dict[Kind, Path]:
    """The curvature and statistics beside a history, but for those that are not of a checkpoint's weights.

    Args:
        kinds: ``curvature``, ``statistics``, or both.
        history: The history's path.
        checkpoint: A folder of float weights; None to take the file as it is.

    Raises:
        CurvatureError: The file is damaged, or of another model.
        StatisticsError: Likewise.
    """
    found = {kind: path for kind in kinds if (path := existing(kind, history)) is not None}
    if not found or checkpoint is None:
        return found
    with Checkpoint(checkpoint) as opened:
        try:
            weights = StoredWeights(opened, RouterNormHistory.load(history).patterns).snapshot(variance=False)
        except StreamingError:
            return found  # the whole model is loaded later, and the files are checked then
    for kind, path in [*found.items()]:
        file = _LOADS[kind](path).for_layers(weights.layers)
        try:
            file.check_router_norms(weights.router_norms)
        except (CurvatureError, StatisticsError) as error:
            print(f"leaves out {path}: {str(error).split('. ')[0]}", file=sys.stderr)
            del found[kind]
    return found
