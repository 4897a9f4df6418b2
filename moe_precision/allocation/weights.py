"""Where the trained weights are, in memory or in a checkpoint: found once, measured once, only what a method reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import released
from ..checkpoints.headers import CheckpointError
from ..layers.materialized import check_materialized
from ..layers.module_tree import root_model
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..layers.patterns import Patterns
from ..layers.router_rows import router_row_norms
from ..plans.numbers import AllocationError
from ..plans.plan import model_type_of
from ..recording.curvature import Curvature
from ..recording.router_norms import max_variances, norms_by_layer
from ..recording.signals import max_variance
from ..recording.statistics import ExpertStatistics
from .calibration import Calibration, calibrated_costs
from .costs import Costs, costs_of_matrices, expert_costs
from .snapshot import Snapshot


class Weights(Protocol):
    """The weights of a trained model."""

    def snapshot(self, variance: bool) -> Snapshot:
        """Router norms, and the variances of the experts if asked for."""

    def costs(
        self,
        widths: Sequence[int],
        group_size: int,
        curvature: Curvature | None,
        statistics: ExpertStatistics | None = None,
        *,
        together: bool = False,
        calibration: Calibration | None = None,
    ) -> Costs:
        """What each width costs each expert matrix, as `expert_costs`, or `calibrated_costs` if that can be done."""


class LiveWeights:
    """The weights of a model in memory; reading is a collective where they are sharded.

    Attributes:
        layers: Its Mixture-of-Experts layers.
    """

    def __init__(self, model: nn.Module, patterns: Patterns) -> None:
        self._patterns = patterns
        self._model_type = model_type_of(root_model(model))
        self.layers = find_moe_layers(model, **patterns)
        check_materialized(self.layers)

    def snapshot(self, variance: bool) -> Snapshot:
        """Router norms, and the variances of the experts if asked for."""
        return Snapshot(
            model_type=self._model_type,
            layers={layer.name: layer.shape for layer in self.layers},
            router_norms=norms_by_layer(self.layers),
            max_variance={layer.name: max_variances(layer) for layer in self.layers} if variance else {},
            caveats={layer.name: layer.caveat for layer in self.layers if layer.caveat},
            patterns=self._patterns,
        )

    def costs(
        self,
        widths: Sequence[int],
        group_size: int,
        curvature: Curvature | None,
        statistics: ExpertStatistics | None = None,
        *,
        together: bool = False,
        calibration: Calibration | None = None,
    ) -> Costs:
        """What each width costs each expert matrix, as `expert_costs`, or as `calibrated_costs` with a calibration."""
        given = self.layers, widths, group_size, curvature, statistics
        if calibration is not None:
            return calibrated_costs(*given, calibration, together=together)
        return expert_costs(*given, together=together)


class StoredWeights:
    """The weights of an open checkpoint, read one tensor at a time; no model is built.

    Args:
        checkpoint: A float checkpoint.
        patterns: As in `find_moe_layers`.

    Raises:
        CheckpointError: It is quantized.
        MoELayerError: Its model has no Mixture-of-Experts layer.
    """

    def __init__(self, checkpoint: Checkpoint, patterns: Patterns | None = None) -> None:
        if checkpoint.is_quantized:
            raise CheckpointError(
                f"{str(checkpoint.folder)!r} is quantized; give the float checkpoint (config.json names "
                f"{checkpoint.quantizer!r})" + released(checkpoint.quantization)
            )
        self._checkpoint, self._patterns = checkpoint, patterns or Patterns()
        self._layers = checkpoint.layers(self._patterns)

    def snapshot(self, variance: bool) -> Snapshot:
        """Router norms, and the variances of the experts if asked for.

        Raises:
            CheckpointError: A tensor is missing or damaged, or a router holds NaN or infinity.
            StreamingError: transformers converts these tensors by more than renaming, stacking and joining.
        """
        found = Snapshot(
            model_type=self._checkpoint.model_type,
            layers={layer.name: layer.shape for layer in self._layers},
            router_norms={layer.name: self._router_norms(layer) for layer in self._layers},
            caveats={layer.name: layer.caveat for layer in self._layers if layer.caveat},
            patterns=self._patterns,
        )
        if broken := found.not_finite():
            raise CheckpointError(f"{str(self._checkpoint.folder)!r}: {broken}; the weights are damaged")
        return replace(found, max_variance=self._variances()) if variance else found

    def costs(
        self,
        widths: Sequence[int],
        group_size: int,
        curvature: Curvature | None,
        statistics: ExpertStatistics | None = None,
        *,
        together: bool = False,
        calibration: Calibration | None = None,
    ) -> Costs:
        """What each width costs each expert matrix, as `expert_costs`, with one matrix in memory at a time.

        Raises:
            AllocationError: There is a calibration, which runs the model.
            CheckpointError: A tensor is missing or damaged.
            StreamingError: As in `snapshot`.
            CostError: A matrix cannot be quantized.
        """
        if calibration is not None:
            raise AllocationError("calibration runs the model: load it and give it in the place of its folder")
        read = self._checkpoint.matrices
        return costs_of_matrices(self._layers, read, widths, group_size, curvature, statistics, together=together)

    def _router_norms(self, layer: MoELayer) -> Tensor:
        return router_row_norms(self._checkpoint.router_weight(layer), num_experts=layer.num_experts)

    def _variances(self) -> dict[str, Tensor]:
        experts = sum(layer.num_experts for layer in self._layers)
        found = {}
        with tqdm(total=experts, desc="variance", unit="expert", disable=None if experts >= 64 else True) as bar:
            for layer in self._layers:
                matrices = self._checkpoint.matrices(layer, layer.first, neurons_alone=True)
                found[layer.name] = torch.stack([max_variance(matrix) for matrix in matrices])
                bar.update(layer.num_experts)
        return found
