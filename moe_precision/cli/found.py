"""Files that stand beside a history but belong to other weights, such as those of the last step of its run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..allocation.weights import StoredWeights
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sources import StreamingError
from ..plans.beside import Kind, existing
from ..recording.curvature import Curvature, CurvatureError
from ..recording.history import RouterNormHistory
from ..recording.statistics import ExpertStatistics, StatisticsError

_LOADS: dict[Kind, Callable[[Any], Curvature | ExpertStatistics]] = {
    "curvature": Curvature.load,
    "statistics": ExpertStatistics.load,
}


def beside_history(kind: Kind, history: str, checkpoint: str | None) -> Path | None:
    """The curvature or statistics beside a history; None if there are none, or none of a checkpoint's weights.

    Args:
        kind: ``curvature`` or ``statistics``.
        history: The history's path.
        checkpoint: A folder of float weights; None to take the file as it is.

    Raises:
        CurvatureError: The file is damaged, or of another model.
        StatisticsError: Likewise.
    """
    path = existing(kind, history)
    if path is None or checkpoint is None:
        return path
    with Checkpoint(checkpoint) as opened:
        try:
            weights = StoredWeights(opened, RouterNormHistory.load(history).patterns).snapshot(variance=False)
        except StreamingError:
            return path  # the whole model is loaded later, and the file is checked then
    file = _LOADS[kind](path).for_layers(weights.layers)
    try:
        file.check_router_norms(weights.router_norms)
    except (CurvatureError, StatisticsError) as error:
        print(f"leaves out {path}: {str(error).split('. ')[0]}", file=sys.stderr)
        return None
    return path
