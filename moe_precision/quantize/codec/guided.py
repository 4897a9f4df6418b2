"""How one expert matrix is fitted: by curvature and by statistics, where there are any."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...recording.curvature import Curvature
from ...recording.statistics import ExpertStatistics, StatisticsError
from .fitting import Fit, Quantized, quantize_matrix


def fit_of(
    layer: str,
    projection: str,
    expert: int,
    curvature: Curvature | None = None,
    statistics: ExpertStatistics | None = None,
) -> Fit:
    """The fit of one expert matrix.

    Args:
        layer: Name of the layer.
        projection: Name of the matrix.
        expert: Its expert.
        curvature: Weighs the errors of input columns.
        statistics: Give the second moment of the inputs, which is made when the matrix is fitted and not kept.
    """
    weights = None if curvature is None else curvature.fit_weights(layer, projection, expert)
    if statistics is None:
        return partial(quantize_matrix, column_weights=weights)
    return partial(_fit, statistics, layer, projection, expert, weights)


def _fit(
    statistics: ExpertStatistics,
    layer: str,
    projection: str,
    expert: int,
    column_weights: Tensor | None,
    weight: Tensor,
    bits: int,
    group_size: int,
) -> Quantized:
    moment = statistics.fit_moment(layer, projection, expert, column_weights)
    try:
        return quantize_matrix(weight, bits, group_size, column_weights, moment)
    except ValueError as error:
        raise StatisticsError(f"{projection!r} of expert {expert} in layer {layer!r}: {error}") from error
