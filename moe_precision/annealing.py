"""Training through a quantization grid: forward passes use the nearest weights on it, gradients go straight through.

Hooks put the quantized weights over the modules' parameters for the time of a forward pass, so that parameters,
optimizer and ``state_dict`` stay those of the float model, under every strategy that gives a module whole parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .module_tree import Weight
from .moe_layers import MoELayer
from .quantize.fitting import codes_on_grid
from .quantize.grid import Grid, on_grid
from .router_norms import norms_by_layer


class AnnealError(ValueError):
    """Experts that cannot be trained through a grid: frozen, behind adapters, or sharded in a way that hides them."""


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
                if not weight.parameter().requires_grad:
                    raise AnnealError(f"{weight.name!r} is frozen: it cannot move on a grid. Train the experts")


class _StraightThrough(torch.autograd.Function):
    """Quantized forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: Tensor, scale: Tensor, offset: Tensor, transposed: bool) -> Tensor:
        return _quantized(weight, bits, scale, offset, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gradient, None, None, None, None


def _quantized(weight: Tensor, bits: Tensor, scale: Tensor, offset: Tensor, transposed: bool) -> Tensor:
    """On the grid, in the layout of the parameter."""
    values = on_grid(_banks(weight, transposed), bits, scale, offset)
    return (values.transpose(1, 2).contiguous() if transposed else values).view_as(weight)


def _banks(weight: Tensor, transposed: bool) -> Tensor:
    """A parameter as ``(E, out, in)``; one matrix is a bank of one."""
    banks = weight if weight.ndim == 3 else weight.unsqueeze(0)
    return banks.transpose(1, 2) if transposed else banks


class GridHooks:
    """Puts every expert weight on a grid during forward passes, until it is closed.

    Args:
        layers: As found by `find_moe_layers`; fused banks or a module an expert.
        grid: Their grid.

    Raises:
        AnnealError: A weight is frozen or not a plain parameter.
    """

    def __init__(self, layers: list[MoELayer], grid: Grid) -> None:
        check_trainable(layers)
        self.grid, self._layers = grid, layers
        self._places: list[_Place] = []
        for layer in layers:
            for name, bank in layer.banks.items():
                widths = grid.widths(layer.name, name)
                scales, offsets = grid.scales[layer.name][name], grid.offsets[layer.name][name]
                for index, weight in enumerate(bank.weights):
                    part = slice(None) if len(bank.weights) == 1 else slice(index, index + 1)
                    self._places.append(
                        _Place(weight, widths[part], scales[part], offsets[part], transposed=bank.transposed)
                    )

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        for place in self._places:
            place.close()

    @torch.no_grad()
    def codes(self) -> list[Tensor]:
        """The codes that the weights have now, uint8, for counting how many change; a collective under FSDP2."""
        return [place.codes() for place in self._places]

    @torch.no_grad()
    def settle(self) -> None:
        """Moves the float weights themselves onto the grid, so that they stay there when saved; a collective."""
        for place in self._places:
            place.settle()
        self.grid.router_norms = norms_by_layer(self._layers)


class _Place:
    """One parameter and its grid."""

    def __init__(self, weight: Weight, bits: Tensor, scale: Tensor, offset: Tensor, transposed: bool) -> None:
        self._module: nn.Module = weight._module
        self._name: str = weight._key
        device = weight.parameter().device
        self._grid = bits.to(device), scale.to(device), offset.to(device)
        self._transposed = transposed
        self._handles = [
            self._module.register_forward_pre_hook(self._cover),
            self._module.register_forward_hook(self._uncover, always_call=True),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._module.__dict__.pop(self._name, None)

    def _cover(self, module: nn.Module, args: Any) -> None:
        weight = module._parameters[self._name]
        assert weight is not None
        values = _StraightThrough.apply(weight, *self._grid, self._transposed)
        module.__dict__[self._name] = values  # found before the parameter, which stays where it is

    def _uncover(self, module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop(self._name, None)

    def codes(self) -> Tensor:
        bits, scale, offset = self._grid
        return codes_on_grid(_banks(self._whole(), self._transposed), bits.clamp(max=8), scale, offset).to(torch.uint8)

    def _whole(self) -> Tensor:
        weight = self._module._parameters[self._name]
        return weight.full_tensor() if isinstance(weight, DTensor) else weight  # type: ignore[return-value]

    def settle(self) -> None:
        weight = self._module._parameters[self._name]
        assert weight is not None
        values = _quantized(self._whole(), *self._grid, self._transposed)
        if isinstance(weight, DTensor):
            values = distribute_tensor(values, weight.device_mesh, weight.placements)
        weight.copy_(values)
