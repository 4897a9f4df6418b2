"""What a model takes at any width, in the file and while it is measured and quantized: from its shapes alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..layers.moe_layers import MoELayer, find_moe_layers
from ..layers.patterns import Patterns
from ..plans.layer_plan import LayerPlan
from ..plans.numbers import AllocationError
from ..plans.plan import PrecisionPlan, model_type_of
from ..plans.settings import expert_weights
from ..plans.widths import WIDTHS, PlanError, check_group_size, stored_bits_per_weight
from .replace import find_targets
from .writer.shards import layer_of

GIB = 2**30
_GROUP_SIZES = (128, 64, 32)
_SHARD_BYTES = 250_000_000  # of a packed file; a larger layer gets its own


@dataclass(frozen=True)
class Fit:
    """What a budget in GiB leaves.

    Attributes:
        expert_gib: GiB for the routed experts.
        stored_bits: Bits per expert weight, scales and offsets included.
        average_bits: Bits per expert weight for codes alone, at most the widest that is packed.
        levels: The widths on both sides of the average; one of them if it is a width.
        uniform: The widest width that all experts can have.
    """

    expert_gib: float
    stored_bits: float
    average_bits: float
    levels: tuple[int, ...]
    uniform: int


class ModelSizes:
    """The parts of a model and what they take.

    Args:
        model: A float model, on any device; the meta device will do.
        patterns: ``router_pattern`` and ``expert_pattern`` for `find_moe_layers`.
        group_size: Weights that share a scale and an offset; by default the largest of 128, 64 and 32 that fits.
        non_expert_bits: 8 or 4 if the other linear layers are quantized too.

    Attributes:
        model_type: The model's type, as plans name it.
        layers: Its Mixture-of-Experts layers.
        dtype: The dtype of the experts.
        group_size: See above.
        parameters: Number of all parameters.
        weights: Number of weights of routed experts.
        float_bytes: Bytes of the float model.
        rest_bytes: Bytes of everything but the routed experts, with ``non_expert_bits``.

    Raises:
        MoELayerError: It has no Mixture-of-Experts layer.
        PlanError: No group size fits, or the one that was asked for does not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        patterns: Patterns | None = None,
        group_size: int | None = None,
        non_expert_bits: int | None = None,
    ) -> None:
        self._model = model
        self.model_type = model_type_of(model)
        self.layers: list[MoELayer] = find_moe_layers(model, **(patterns or Patterns()))
        self.shapes = {layer.name: layer.shape for layer in self.layers}
        self.group_size = self._fitting() if group_size is None else group_size
        for name, shape in self.shapes.items():
            check_group_size(self.group_size, name, shape.projections)
        self.dtype: torch.dtype = next(iter(self.layers[0].banks.values())).weights[0].parameter().dtype
        tensors = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.weights = expert_weights(self.shapes.values())
        self.float_bytes = sum(tensor.nbytes for _, tensor in tensors.values())
        by_layer: dict[str, int] = defaultdict(int)
        for name, tensor in tensors.values():
            by_layer[layer_of(name)] += tensor.nbytes
        self.largest_layer = max(by_layer, key=lambda name: by_layer[name])
        self._layer_bytes = dict(by_layer)
        self.rest_bytes = self.float_bytes - self.weights * self.dtype.itemsize
        if non_expert_bits is not None:
            self.rest_bytes -= self._saved(model, non_expert_bits)

    def _fitting(self) -> int:
        widths = {inp for shape in self.shapes.values() for _, inp in shape.projections.values()}
        found = next((size for size in _GROUP_SIZES if all(width % size == 0 for width in widths)), None)
        if found is None:
            raise PlanError(f"no group size of 32, 64 or 128 divides the experts' input widths {sorted(widths)}")
        return found

    def _saved(self, model: PreTrainedModel, bits: int) -> int:
        """Bytes that quantizing the other linear layers saves."""
        targets = find_targets(model, self.layers, self._uniform(2), bits)
        inside = tuple(f"{layer.experts}." for layer in self.layers)
        others = [target for target in targets if not target.parameter.startswith(inside)]
        weights = sum(target.shape[0] * target.shape[1] for target in others)
        return weights * self.dtype.itemsize - round(weights * stored_bits_per_weight(bits, self.group_size) / 8)

    def _uniform(self, bits: int) -> PrecisionPlan:
        layers = {
            name: LayerPlan(shape, {projection: [bits] * shape.num_experts for projection in shape.projections})
            for name, shape in self.shapes.items()
        }
        return PrecisionPlan(self.model_type, layers, self.group_size, "uniform")

    def stored_bits(self, average_bits: float) -> float:
        """Stored bits per expert weight for codes of an average width up to 8; 16 is the float weight itself."""
        if average_bits == 16:
            return 8.0 * self.dtype.itemsize
        return average_bits + stored_bits_per_weight(1, self.group_size) - 1

    def expert_bytes(self, stored_bits: float) -> float:
        """Bytes of all routed experts."""
        return self.weights * stored_bits / 8

    def stored_bits_of(self, plan: PrecisionPlan) -> float:
        """Stored bits per expert weight of a plan.

        Raises:
            PlanError: The plan is for another model.
        """
        plan = plan.for_model(self._model, self.shapes)
        bits = 0.0
        for layer in plan.layers.values():
            for projection, widths in layer.projection_bits.items():
                out, inp = layer.shape.projections[projection]
                for width in widths:
                    whole = width == 16
                    bits += (
                        out
                        * inp
                        * (8 * self.dtype.itemsize if whole else stored_bits_per_weight(width, plan.group_size))
                    )
        return bits / self.weights

    def fit(self, expert_gib: float | None = None, total_gib: float | None = None) -> Fit:
        """What a budget leaves, of the experts or of the whole model.

        Raises:
            AllocationError: It is less than all experts at 1 bit take.
        """
        given = f"{expert_gib:g} GiB for the experts" if expert_gib is not None else f"{total_gib:g} GiB in total"
        room = expert_gib if expert_gib is not None else (total_gib or 0.0) - self.rest_bytes / GIB
        stored = room * GIB * 8 / self.weights
        least = self.expert_bytes(self.stored_bits(1))
        if stored < self.stored_bits(1):
            raise AllocationError(
                f"{given} is too little: at 1 bit ({self.stored_bits(1):.4g} stored, group size {self.group_size}) the "
                f"experts take {least / GIB:.4g} GiB, and the rest takes {self.rest_bytes / GIB:.4g} GiB"
            )
        average = min(stored - self.stored_bits(1) + 1, 8.0)
        uniform = max(width for width in WIDTHS if self.stored_bits(width) <= stored)
        if uniform == 16:
            return Fit(room, stored, 16.0, (16,), 16)
        low = int(average)
        return Fit(room, stored, average, (low,) if average == low else (low, low + 1), uniform)

    def quantizing_bytes(self, stored_bits: float) -> float:
        """Bytes that one process of `quantize_checkpoint` holds at most, beside the imports.

        The largest layer as it is read, as much again for transformers to convert it, and one packed file.

        Args:
            stored_bits: Bits per expert weight.
        """
        layer = max(self._layer_bytes.values())
        experts = max(shape.expert_size * shape.num_experts for shape in self.shapes.values())
        packed = experts * stored_bits / 8
        with_rest = max(packed, layer - experts * self.dtype.itemsize + packed)
        whole = self.rest_bytes + self.expert_bytes(stored_bits)
        found: float = 2 * layer + max(with_rest, min(_SHARD_BYTES, whole))
        return found
