"""What each width would cost each expert matrix: the error of our own quantizer, and how much of it the loss feels.

Without more knowledge that is the squared error of the weights. Curvature weights it by row and by column; statistics
count the errors of a row together, as they act on the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..errors import MoEPrecisionError
from ..layers.moe_layers import MoELayer
from ..plans.widths import DROPPED
from ..quantize.codec.fitting import Fit, at_a_time
from ..quantize.codec.guided import fit_of
from ..quantize.kernels import scaled
from ..recording.curvature import Curvature
from ..recording.statistics import ExpertStatistics


class CostError(MoEPrecisionError, ValueError):
    """Experts that cannot be quantized, or whose weights cannot be put back."""


Costs = dict[str, dict[str, Tensor]]  # layer -> projection -> (E, widths) float64
Price = Callable[[Tensor, Tensor], float]  # of a weight and what it becomes, both (out, in)


def expert_costs(
    layers: list[MoELayer],
    widths: Sequence[int],
    group_size: int,
    curvature: Curvature | None = None,
    statistics: ExpertStatistics | None = None,
    *,
    together: bool = False,
) -> Costs:
    """Quantizes every expert matrix at every width and measures what is lost; a collective where experts are sharded.

    Args:
        layers: As found by `find_moe_layers`, with weights.
        widths: Candidate widths; 16 costs nothing. At 0 a matrix is gone; an expert's absence costs the sum over its
            matrices.
        group_size: Weights that share a scale and an offset.
        curvature: Weights the fit and the errors, so that costs are in proportion to the predicted increase of the
            loss; None gives squared weight errors.
        statistics: The fit rounds under them, as the quantize step will.
        together: Errors of a row count together, by the statistics (`statistics_cost`), instead of one by one.

    Raises:
        CostError: A matrix cannot be quantized.

    Returns:
        For each layer and projection ``(E, len(widths))`` float64.
    """

    def read(layer: MoELayer, projection: str) -> Iterator[Tensor]:
        with layer.whole():
            for matrix in layer.banks[projection].matrices():
                yield matrix.full_tensor() if isinstance(matrix, DTensor) else matrix

    return costs_of_matrices(layers, read, widths, group_size, curvature, statistics, together=together)


def costs_of_matrices(
    layers: list[MoELayer],
    read: Callable[[MoELayer, str], Iterable[Tensor]],
    widths: Sequence[int],
    group_size: int,
    curvature: Curvature | None,
    statistics: ExpertStatistics | None = None,
    *,
    together: bool = False,
) -> Costs:
    """Computes `expert_costs` of matrices wherever they are: ``read`` yields those of a layer's projection in order."""
    costs: Costs = {}
    total = sum(len(layer.banks) * layer.num_experts for layer in layers)
    by = statistics if together else None
    with torch.no_grad(), tqdm(total=total, desc="costs", unit="matrix", disable=None) as bar:
        for layer in layers:
            costs[layer.name] = {}
            for name in layer.banks:
                found = torch.zeros(layer.num_experts, len(widths), dtype=torch.float64)
                for experts, weights in _stacked(read(layer, name), layer.num_experts, layer.banks[name].shape):
                    fit = fit_of(layer.name, name, experts, curvature, statistics)
                    prices = [pricing(curvature, by, layer.name, name, expert) for expert in experts]
                    for index, bits in reversed(list(enumerate(widths))):  # 0 bits after fits, which try the moments
                        if bits != 16:
                            quantized = quantized_matrices(weights, bits, group_size, fit)
                            for expert, price, *pair in zip(experts, prices, weights, quantized, strict=True):
                                found[expert, index] = price(*pair)
                    bar.update(len(experts))
                costs[layer.name][name] = found
    return costs


def _stacked(matrices: Iterable[Tensor], count: int, shape: tuple[int, int]) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Experts and their matrices ``(N, out, in)``, stacked as they come: all are read to the end, and none is kept.

    Raises:
        ValueError: There are more or fewer than ``count`` of them.
    """
    parts = {part[-1]: part for part in at_a_time(range(count), shape)}  # by its last expert
    waiting = []
    for expert, matrix in zip(range(count), matrices, strict=True):
        waiting.append(matrix)
        if expert in parts:
            yield parts[expert], torch.stack(waiting)
            waiting = []


def quantized_matrices(weights: Tensor, bits: int, group_size: int, fit: Fit) -> Tensor:
    """What matrices are at a width, ``(N, out, in)`` float32.

    Args:
        weights: ``(N, out, in)``.
        bits: The width, below 16; at 0 nothing is left.
        group_size: Weights that share a scale and an offset.
        fit: As `fit_of` gives it.

    Raises:
        CostError: One cannot be quantized.
    """
    if bits == DROPPED:
        return torch.zeros_like(weights, dtype=torch.float32)
    try:
        return scaled(*fit(weights, bits, group_size))
    except ValueError as error:
        raise CostError(str(error)) from error


def check_plain(layers: Iterable[MoELayer]) -> None:
    """Checks that other values can be written into the experts of a live model.

    Raises:
        CostError: They are sharded, or behind adapters.
    """
    for weight in (weight for layer in layers for bank in layer.banks.values() for weight in bank.weights):
        read = weight.read()
        if type(read.data) is not Tensor or read is not weight.parameter():
            raise CostError(f"{weight.name!r} is sharded or behind an adapter: give the merged model")


def pricing(
    curvature: Curvature | None, statistics: ExpertStatistics | None, layer: str, projection: str, expert: int
) -> Price:
    """How the error of one matrix is priced.

    Args:
        curvature: None gives the squared error of the weights.
        statistics: Errors of a row then count together; an expert that no token has reached is priced by curvature.
        layer: Name of the layer.
        projection: Name of the matrix.
        expert: Its expert.
    """
    if curvature is None:
        return lambda weight, quantized: float(weight_error(weight, quantized))
    rows, columns = curvature.rows[layer][projection][expert], curvature.columns[layer][projection][expert]
    weights = curvature.fit_weights(layer, projection, expert)
    moment = None if statistics is None else statistics.fit_moment(layer, projection, expert, weights)
    indefinite = set() if statistics is None else statistics.indefinite  # where a fit, later, may find this one

    def price(weight: Tensor, quantized: Tensor) -> float:
        if moment is None or (layer, projection, expert) in indefinite:
            return float(curvature_cost(weight, quantized, rows, columns))
        return float(statistics_cost(weight, quantized, rows, columns, moment))

    return price


def shuffled_costs(costs: Costs, seed: int) -> Costs:
    """The same costs, given to other experts: within each layer, whole experts change places at random.

    A control of costs: what it loses against them shows that they are the right experts' costs.

    Args:
        costs: For each layer and projection ``(E, widths)`` float64.
        seed: Of the permutations, one for each layer.
    """
    generator = torch.Generator().manual_seed(seed)
    found: Costs = {}
    for layer, projections in costs.items():
        order = torch.randperm(len(next(iter(projections.values()))), generator=generator)
        found[layer] = {name: of[order] for name, of in projections.items()}
    return found


def weight_error(weight: Tensor, quantized: Tensor) -> Tensor:
    """Squared error of a quantized matrix, ``sum (Q - W)**2``.

    Args:
        weight: ``(out, in)``.
        quantized: The same shape.

    Returns:
        Scalar float32.
    """
    return (quantized.float() - weight.float()).square().sum()


def curvature_cost(weight: Tensor, quantized: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What quantizing a matrix costs by a second-order expansion of the loss: ``1/2 sum v (Q - W)**2``.

    ``v``, Adam's bias-corrected second moment, stands for the diagonal of the Hessian (the empirical Fisher matrix) and
    is taken as ``rows[i] * columns[j] / mean(v)``. Gradients are means over a batch, so costs are too small by a factor
    of about the number of tokens in it. All matrices of a run share this factor, so costs can be compared and added.

    Args:
        weight: ``(out, in)``.
        quantized: The same shape.
        rows: Mean of ``v`` over each row, ``(out,)``.
        columns: Mean of ``v`` over each column, ``(in,)``.

    Returns:
        Scalar float32.
    """
    squared = (quantized.float() - weight.float()).square()  # (out, in)
    mean = rows.mean()
    if mean == 0:
        return mean  # an expert that never had a gradient
    return 0.5 * (rows.to(squared) @ squared @ columns.to(squared)) / mean.to(squared)


def statistics_cost(weight: Tensor, quantized: Tensor, rows: Tensor, columns: Tensor, moment: Tensor) -> Tensor:
    """What quantizing a matrix costs where its inputs' second moment is known: ``1/2 sum_i r_i d_i H d_i^T``.

    ``d_i`` is the error of row i, ``r_i`` the row's mean squared gradient divided by that of the matrix, and ``H`` the
    second moment, scaled so that its trace is the sum of the column means. Where ``H`` is a diagonal in proportion to
    the column means, this is `curvature_cost`; else errors of columns that move together add up or cancel, as they do
    in the output.

    Args:
        weight: ``(out, in)``.
        quantized: The same shape.
        rows: Mean of the squared gradient over each row, ``(out,)``.
        columns: Mean over each column, ``(in,)``.
        moment: ``(in, in)`` float32, of any scale.

    Returns:
        Scalar float32.
    """
    error = quantized.float() - weight.float()  # (out, in)
    mean = rows.mean()
    if mean == 0:
        return mean  # an expert that never had a gradient
    moment = moment.to(error)
    by_row = ((error @ moment) * error).sum(dim=1)  # (out,)
    scale = columns.sum().to(error) / moment.trace()
    return 0.5 * scale * (rows.to(error) @ by_row) / mean.to(error)
