"""How expert matrices are fitted: by curvature and by statistics, where there are any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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
    first, forget = first_fit(weights, bits, group_size), partial(statistics.linears.tokens.pop, name)
    return _under(statistics.linears.fit_moment(name), weights, first, bits, f"linear layer {name!r}", forget)


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
    names = [f"{projection!r} of expert {expert} in layer {layer!r}" for expert in experts]
    try:
        first = first_fit(weights, bits, group_size, columns)
    except FitError as error:
        raise FitError(f"{names[error.index]}: {error}", error.index) from error
    if statistics is None:
        return as_stored(weights, first, bits)
    found = []
    for index, (expert, name) in enumerate(zip(experts, names, strict=True)):
        moment = statistics.fit_moment(layer, projection, expert, None if columns is None else columns[index])
        one, forget = slice(index, index + 1), partial(statistics.indefinite.add, (layer, projection, expert))
        found.append(_under(moment, weights[one], FirstFit(*(of[one] for of in first)), bits, name, forget))
    codes, scales, offsets = (torch.cat(of) for of in zip(*found, strict=True))
    return codes, scales, offsets


def _under(
    moment: Tensor | None, weight: Tensor, first: FirstFit, bits: int, name: str, forget: Callable[[], object]
) -> Quantized:
    """Rounds a first fit of one matrix ``(1, out, in)`` under its second moment, or as it is if that is none.

    Args:
        moment: ``(in, in)``, or None.
        weight: The matrix.
        first: Its fit.
        bits: Width of a code.
        name: Of the matrix, for messages.
        forget: Called if the moment has negative eigenvalues, so that nobody takes it again.

    Raises:
        StatisticsError: The moment is damaged.
    """
    try:
        if moment is not None:
            codes, scale, offset = round_by_moment(weight[0], first.scale[0], first.offset[0], bits, moment)
            return codes.unsqueeze(0), scale.unsqueeze(0), offset.unsqueeze(0)
    except IndefiniteError as error:
        forget()
        warnings.warn(f"{name} is fitted without statistics: {error}. Collect them again", stacklevel=4)
    except ValueError as error:
        raise StatisticsError(f"{name}: {error}") from error
    return as_stored(weight, first, bits)
