"""A float model that takes on one plan after another: every expert matrix is quantized once at every width and kept.

A plan's loss is that of the packed model up to float rounding, and takes one evaluation to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..allocation.calibration import Calibration, calibrate_dropping, scale_to
from ..allocation.costs import Costs, check_plain, pricing
from ..layers.moe_layers import MoELayer
from ..plans.widths import DROPPED
from ..quantize.codec.fitting import Fit, Quantized, at_a_time
from ..quantize.codec.guided import fit_of
from ..quantize.kernels import scaled
from ..recording.curvature import Curvature
from ..recording.statistics import ExpertStatistics

Quantizer = Callable[[Tensor, int, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Bits = Mapping[str, Mapping[str, Sequence[int]]]  # layer -> projection -> width of each expert
Matrix = tuple[str, str, int]  # layer, projection, expert
Group = tuple[str, str, int]  # layer, projection, width


class SimulatedExperts(AbstractContextManager["SimulatedExperts"]):
    """Puts quantized values into the expert weights of a live float model; on leaving, the float ones are back.

    Args:
        layers: As found by `find_moe_layers`, whole on this process, with plain parameters.
        widths: Widths that will be asked for; 0 and 16 are always there.
        group_size: Weights that share a scale and an offset.
        curvature: Weights the fit, as in the quantize step; None for an unweighted one.
        quantizer: Fits a matrix instead of ours, from weight, width, group size and column weights.
        statistics: Our fit rounds by them, as in the quantize step; None for none.

    Raises:
        CostError: The experts are sharded, or behind adapters.
    """

    def __init__(
        self,
        layers: list[MoELayer],
        widths: Sequence[int],
        group_size: int,
        curvature: Curvature | None = None,
        quantizer: Quantizer | None = None,
        statistics: ExpertStatistics | None = None,
    ) -> None:
        self.layers, self.widths, self.group_size = layers, sorted(set(widths) - {DROPPED, 16}), group_size
        self.curvature, self.statistics = curvature, statistics
        self._floats: dict[Matrix, Tensor] = {}
        self._live: dict[Matrix, Tensor] = {}
        self._quantized: dict[tuple[Matrix, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._now: dict[Matrix, int] = {}
        check_plain(layers)
        total = sum(len(layer.banks) * layer.num_experts for layer in layers)
        with torch.no_grad(), tqdm(total=total, desc="quantizing", unit="matrix", leave=False, disable=None) as bar:
            for layer in layers:
                for name, bank in layer.banks.items():
                    for experts in at_a_time(range(layer.num_experts), bank.shape):
                        places = [(layer.name, name, expert) for expert in experts]
                        for matrix in places:
                            live = bank.read(matrix[2])
                            self._live[matrix], self._floats[matrix], self._now[matrix] = live, live.clone(), 16
                        weights = torch.stack([self._floats[matrix] for matrix in places])
                        fit = fit_of(layer.name, name, experts, curvature, statistics)
                        if quantizer is not None:
                            fit = _one_by_one(quantizer, places, curvature)
                        for bits in self.widths:
                            for matrix, *found in zip(places, *fit(weights, bits, group_size), strict=True):
                                self._quantized[matrix, bits] = found[0], found[1], found[2]
                        bar.update(len(experts))

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def apply(self, bits: Bits) -> None:
        """Gives every expert matrix its values at a plan's widths."""
        for layer, projections in bits.items():
            for projection, widths in projections.items():
                for expert, width in enumerate(widths):
                    self.set((layer, projection, expert), width)

    @torch.no_grad()
    def set(self, matrix: Matrix, bits: int) -> None:
        """Gives one matrix another width."""
        if self._now[matrix] != bits:
            self._live[matrix].copy_(self.values(matrix, bits))
            self._now[matrix] = bits

    def values(self, matrix: Matrix, bits: int) -> Tensor:
        """What a matrix is at a width, ``(out, in)``: the float weight at 16, and 0 at 0."""
        if bits == DROPPED:
            return torch.zeros_like(self._floats[matrix])
        return self._floats[matrix] if bits == 16 else scaled(*self._quantized[matrix, bits])

    def restore(self) -> None:
        """Puts the float weights back."""
        for matrix in self._now:
            self.set(matrix, 16)

    def costs(self, levels: Sequence[int], curvature: Curvature | None, *, together: bool = False) -> Costs:
        """What every matrix costs at every level, as `expert_costs`.

        Args:
            levels: Widths.
            curvature: Weighs the errors; None for squared errors.
            together: Errors of a row count together, by the statistics.
        """
        by = self.statistics if together else None

        def of(matrix: Matrix) -> list[float]:
            price = pricing(curvature, by, *matrix)
            return [price(self._floats[matrix], self.values(matrix, bits)) for bits in levels]

        return self._of_all(of)

    def divergences(self, levels: Sequence[int], calibration: Calibration) -> dict[Group, float]:
        """Divergence of the model whose experts of one projection of one layer are all at one of the levels.

        Args:
            levels: Widths; 0 and 16 are left out.
            calibration: Of the model as it was.
        """
        self.restore()
        widths = [bits for bits in levels if bits not in (DROPPED, 16)]
        groups = [(layer, name, bits) for layer in self.layers for name in layer.banks for bits in widths]
        found = {}
        for layer, name, bits in tqdm(groups, desc="calibrating", unit="width", leave=False, disable=None):
            experts = [(layer.name, name, expert) for expert in range(layer.num_experts)]
            for matrix in experts:
                self.set(matrix, bits)
            found[layer.name, name, bits] = calibration.divergence()
            for matrix in experts:
                self.set(matrix, 16)
        return found

    def calibrated(
        self, costs: Costs, levels: Sequence[int], measured: Mapping[Group, float], calibration: Calibration
    ) -> Costs:
        """Costs scaled to what was measured, as `calibrated_costs` are.

        Args:
            costs: At the levels.
            levels: Widths.
            measured: What `divergences` returned for them.
            calibration: For the level 0.
        """
        self.restore()
        found = {layer: {name: of.clone() for name, of in parts.items()} for layer, parts in costs.items()}
        for layer in self.layers:
            for (name, of), (index, bits) in product(found[layer.name].items(), enumerate(levels)):
                if (layer.name, name, bits) in measured:
                    scale_to([of[:, index]], measured[layer.name, name, bits])
            if DROPPED in levels:
                calibrate_dropping(layer, found[layer.name], list(levels).index(DROPPED), calibration)
        return found

    def sensitivity(self, levels: Sequence[int], loss: Callable[[], float], name: str = "sensitivity") -> Costs:
        """Measured increase of a loss when one matrix alone is quantized: the reference that signals are judged by.

        Slow: one loss for each expert, projection and level. At 0 bits an expert is dropped whole, and each of its
        matrices is given its share of that loss.

        Args:
            levels: Widths.
            loss: Computes the loss of the model as it is now.
            name: Label of the progress bar.

        Returns:
            For each layer and projection ``(E, len(levels))`` float64; can be negative.
        """
        self.restore()
        base = loss()
        with tqdm(total=len(self._now) * len(levels), desc=name, unit="loss", leave=False, disable=None) as bar:

            def of(matrix: Matrix) -> list[float]:
                layer, _, expert = matrix
                whole = [one for one in self._now if one[0] == layer and one[2] == expert]
                found = []
                for bits in levels:
                    together = whole if bits == DROPPED else [matrix]
                    for one in together:
                        self.set(one, bits)
                    found.append((loss() - base) / len(together))
                    bar.update()
                    for one in together:
                        self.set(one, 16)
                return found

            return self._of_all(of)

    def _of_all(self, of: Callable[[Matrix], list[float]]) -> Costs:
        return {
            layer.name: {
                name: torch.tensor([of((layer.name, name, e)) for e in range(layer.num_experts)], dtype=torch.float64)
                for name in layer.banks
            }
            for layer in self.layers
        }


def _one_by_one(quantizer: Quantizer, matrices: Sequence[Matrix], curvature: Curvature | None) -> Fit:
    """A fit that calls another quantizer for each matrix."""

    def fit(weights: Tensor, bits: int, group_size: int) -> Quantized:
        columns = [None if curvature is None else curvature.fit_weights(*matrix) for matrix in matrices]
        each = [quantizer(weight, bits, group_size, of) for weight, of in zip(weights, columns, strict=True)]
        codes, scales, offsets = (torch.stack(of) for of in zip(*each, strict=True))
        return codes, scales, offsets

    return fit
