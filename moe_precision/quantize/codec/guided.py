"""How expert matrices are fitted: by curvature and by statistics, where there are any."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...recording.curvature import Curvature
from ...recording.statistics import ExpertStatistics, StatisticsError
from .fitting import FirstFit, Fit, FitError, Quantized, as_stored, first_fit, quantize_matrices
from .rounding import IndefiniteError, round_by_moment


def fit_of(
    layer: str,
    projection: str,
    experts: Sequence[int],
    curvature: Curvature | None = None,
    statistics: ExpertStatistics | None = None,
) -> Fit:
    """The fit of the matrices of some experts.

    Args:
        layer: Name of the layer.
        projection: Name of the matrices.
        experts: Theirs.
        curvature: Weighs the errors of input columns.
        statistics: Give the second moment of the inputs, which is made when the matrix is fitted and not kept. One
            that has negative eigenvalues is left out with a warning, and remembered as ``indefinite``.

    Returns:
        A fit, whose errors name the matrix.
    """
    return partial(_fit, layer, projection, experts, curvature, statistics)


def linear_fit_of(name: str, statistics: ExpertStatistics | None) -> Fit:
    """The fit of a linear layer outside of experts: under its inputs' second moment, where that is known."""
    if statistics is None or name not in statistics.linears.tokens:
        return quantize_matrices
    return partial(_fit_linear, statistics, name)


def _fit_linear(statistics: ExpertStatistics, name: str, weights: Tensor, bits: int, group_size: int) -> Quantized:
    moment = statistics.linears.fit_moment(name)
    first = first_fit(weights, bits, group_size)
    if moment is None:
        return as_stored(weights, first, bits)
    try:
        return _stacked([round_by_moment(weights[0], first.scale[0], first.offset[0], bits, moment)])
    except IndefiniteError as error:
        del statistics.linears.tokens[name]  # for what comes
        _warn(f"linear layer {name!r}", error)
        return as_stored(weights, first, bits)
    except ValueError as error:
        raise StatisticsError(f"linear layer {name!r}: {error}") from error


def _fit(
    layer: str,
    projection: str,
    experts: Sequence[int],
    curvature: Curvature | None,
    statistics: ExpertStatistics | None,
    weights: Tensor,
    bits: int,
    group_size: int,
) -> Quantized:
    columns = None
    if curvature is not None:
        columns = torch.stack([curvature.fit_weights(layer, projection, expert) for expert in experts])
    try:
        first = first_fit(weights, bits, group_size, columns)
    except FitError as error:
        raise FitError(f"{_name(layer, projection, experts[error.index])}: {error}", error.index) from error
    if statistics is None:
        return as_stored(weights, first, bits)
    found: list[Quantized] = []
    for index, expert in enumerate(experts):
        of_column = None if columns is None else columns[index]
        moment = statistics.fit_moment(layer, projection, expert, of_column)
        try:
            if moment is not None:
                found.append(round_by_moment(weights[index], first.scale[index], first.offset[index], bits, moment))
                continue
        except IndefiniteError as error:
            statistics.indefinite.add((layer, projection, expert))
            _warn(_name(layer, projection, expert), error)
        except ValueError as error:
            raise StatisticsError(f"{_name(layer, projection, expert)}: {error}") from error
        one = slice(index, index + 1)
        codes, scale, offset = as_stored(weights[one], FirstFit(*(of[one] for of in first)), bits)
        found.append((codes[0], scale[0], offset[0]))
    return _stacked(found)


def _stacked(found: list[Quantized]) -> Quantized:
    if len(found) == 1:
        return found[0][0].unsqueeze(0), found[0][1].unsqueeze(0), found[0][2].unsqueeze(0)
    codes, scales, offsets = (torch.stack(of) for of in zip(*found, strict=True))
    return codes, scales, offsets


def _name(layer: str, projection: str, expert: int) -> str:
    return f"{projection!r} of expert {expert} in layer {layer!r}"


def _warn(what: str, error: IndefiniteError) -> None:
    warnings.warn(f"{what} is fitted without statistics: {error}. Collect them again", stacklevel=3)
