"""How one expert matrix is fitted: by curvature and by statistics, where there are any."""

from __future__ import annotations

import warnings
from functools import partial

from torch import Tensor

from ...recording.curvature import Curvature
from ...recording.statistics import ExpertStatistics, StatisticsError
from .fitting import Fit, Quantized, quantize_matrix
from .rounding import IndefiniteError


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
        statistics: Give the second moment of the inputs, which is made when the matrix is fitted and not kept. One
            that has negative eigenvalues is left out with a warning, and remembered as ``indefinite``.
    """
    weights = None if curvature is None else curvature.fit_weights(layer, projection, expert)
    if statistics is None:
        return partial(quantize_matrix, column_weights=weights)
    return partial(_fit, statistics, layer, projection, expert, weights)


def linear_fit_of(name: str, statistics: ExpertStatistics | None) -> Fit:
    """The fit of a linear layer outside of experts: under its inputs' second moment, where that is known."""
    if statistics is None or name not in statistics.linears.tokens:
        return quantize_matrix
    return partial(_fit_linear, statistics, name)


def _fit_linear(statistics: ExpertStatistics, name: str, weight: Tensor, bits: int, group_size: int) -> Quantized:
    moment = statistics.linears.fit_moment(name)
    try:
        return quantize_matrix(weight, bits, group_size, None, moment)
    except IndefiniteError as error:
        del statistics.linears.tokens[name]  # for what comes
        _warn(f"linear layer {name!r}", error)
        return quantize_matrix(weight, bits, group_size)
    except ValueError as error:
        raise StatisticsError(f"linear layer {name!r}: {error}") from error


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
    what = f"{projection!r} of expert {expert} in layer {layer!r}"
    try:
        return quantize_matrix(weight, bits, group_size, column_weights, moment)
    except IndefiniteError as error:
        statistics.indefinite.add((layer, projection, expert))
        _warn(what, error)
        return quantize_matrix(weight, bits, group_size, column_weights)
    except ValueError as error:
        raise StatisticsError(f"{what}: {error}") from error


def _warn(what: str, error: IndefiniteError) -> None:
    warnings.warn(f"{what} is fitted without statistics: {error}. Collect them again", stacklevel=3)
