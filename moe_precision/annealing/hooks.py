"""Training through a quantization grid: forward passes use the nearest weights on it, gradients go straight through.

Hooks put the quantized weights over the modules' parameters for the time of a forward pass, so that parameters,
optimizer and ``state_dict`` stay those of the float model, under every strategy that gives a module whole parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..compat import forget_compiled_code, forward_pre_hooks
from ..layers.moe_layers import MoELayer
from ..quantize.codec.grid import Grid
from ..recording.router_norms import norms_by_layer
from .buffers import Buffers
from .covers import AnnealError, Cover, Place, QuantizedAgain

PATIENCE = 20  # steps, within which even a layer that is left out of every second one takes part


def check_trainable(layers: list[MoELayer]) -> None:
    """Raises `AnnealError` unless every expert weight is a plain parameter in training."""
    for layer in layers:
        for bank in layer.banks.values():
            for weight in bank.weights:
                if weight.gathers or weight.read() is not weight.parameter():
                    raise AnnealError(
                        f"{weight.name!r} is behind an adapter (LoRA), a parametrization, or a flat shard (FSDP1, "
                        "DeepSpeed): training through a grid needs the plain parameter. Merge adapters first"
                    )
                if layer.layout not in ("fused", "modules") or (layer.fused and weight.shape[0] > layer.num_experts):
                    raise AnnealError(f"{weight.name!r}: experts laid out as {layer.layout!r} cannot be annealed yet")
                if bank.parts > 1:
                    raise AnnealError(f"{weight.name!r}: experts under expert parallelism cannot be annealed yet")
                if not weight.parameter().requires_grad:
                    raise AnnealError(
                        f"{weight.name!r} is frozen: it cannot move on a grid. Train the experts, or keep them packed "
                        "and train the routers alone (moe-precision fit --config recipes/recover.yaml --train routers)"
                    )


def uncover(layers: list[MoELayer]) -> None:
    """Removes the hooks that an interrupted run left, if any."""
    for layer in layers:
        for bank in layer.banks.values():
            for weight in bank.weights:
                for hook in forward_pre_hooks(weight.module):
                    if isinstance(cover := getattr(hook, "__self__", None), Cover):
                        cover.close()


class GridHooks:
    """Puts every expert weight on a grid during forward passes, until it is closed.

    Args:
        layers: As found by `find_moe_layers`; fused banks or one module per expert.
        grid: Their grid.

    Attributes:
        layers: Those whose weights are on the grid.

    Raises:
        AnnealError: A weight is frozen or not a plain parameter.
    """

    def __init__(self, layers: list[MoELayer], grid: Grid) -> None:
        uncover(layers)
        check_trainable(layers)
        self.grid, self.layers = grid, layers
        self._places: list[Place] = []
        buffers = Buffers()
        again = QuantizedAgain(buffers)
        covers: dict[nn.Module, Cover] = {}
        for layer in layers:
            for name, bank in layer.banks.items():
                widths = grid.plan.layers[layer.name].projection_bits[name]
                scales, offsets = grid.scales[layer.name][name], grid.offsets[layer.name][name]
                for index, weight in enumerate(bank.weights):
                    part = slice(None) if len(bank.weights) == 1 else slice(index, index + 1)
                    device = weight.parameter().device
                    place = Place(
                        module=weight.module,
                        name=weight.key,
                        layer=layer.name,
                        projection=name,
                        bits=widths[part],
                        scale=scales[part].to(device),
                        offset=offsets[part].to(device),
                        transposed=bank.transposed,
                        dtype=weight.dtype,
                    )
                    self._places.append(place)
                    covers.setdefault(place.module, Cover(place.module, buffers, again)).places.append(place)
        self._covers = list(covers.values())
        for cover in self._covers:
            cover.attach()
        forget_compiled_code()

    def close(self) -> None:
        """Removes the hooks; a second call does nothing."""
        for cover in self._covers:
            cover.close()
        forget_compiled_code()

    def check_used(self, steps: int = PATIENCE) -> bool:
        """Whether every projection of every layer has had its gradient through the grid.

        Args:
            steps: Taken on the grid so far. Within the first `PATIENCE` a layer may be without a gradient: layerdrop
                leaves layers out of some steps.

        Raises:
            AnnealError: One has none after so many steps, or a wrong one.
        """
        used = {(place.layer, place.projection) for place in self._places if place.gradients and not place.lost}
        missing = [place for place in self._places if (place.layer, place.projection) not in used]
        wrong = [place for place in missing if place.lost]
        if not missing or (not wrong and steps < PATIENCE):
            return not missing
        place = (wrong or missing)[0]
        raise AnnealError(
            f"no expert of {place.layer!r} has learned through its quantized {place.projection!r}: the layer "
            f"took no part in {steps} steps, reads the weights without calling the modules that own them, or uses "
            "gradient checkpointing inside them; such layers cannot be annealed"
        )

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Forward passes inside use the float weights."""
        for cover in self._covers:
            cover.lifted = True
        try:
            yield
        finally:
            for cover in self._covers:
                cover.lifted = False

    @torch.no_grad()
    def codes(self) -> list[Tensor]:
        """The weights' codes now, uint8, for counting how many change: of evenly spaced rows of every matrix.

        A collective under FSDP2.
        """
        return [place.codes() for place in self._places]

    @torch.no_grad()
    def settle(self) -> None:
        """Moves the float weights themselves onto the grid, so that they stay there when saved; a collective."""
        for place in self._places:
            place.settle()
        self.grid.router_norms = norms_by_layer(self.layers)
