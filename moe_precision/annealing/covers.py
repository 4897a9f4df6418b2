"""Quantized weights over a module's parameters during its forward pass, with straight-through gradients.

A `Place` is one parameter and its grid, a `Cover` the hooks of one module. Only one layer's quantized weights are held
(one of each shape): what a backward pass needs of them is quantized again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, distribute_tensor

from ..compat import own_parameters, run_first_in_backward, saved_tensors_hooks_are_set, version_of
from ..errors import MoEPrecisionError
from ..layers.banks import Bank
from ..plans.widths import DROPPED
from ..quantize.codec.fitting import codes_on_grid
from ..quantize.codec.grid import on_grid
from ..recording.processes import of_first
from .buffers import Buffers

_CODES_COUNTED = 1 << 16  # about this many of each parameter: enough for a share shown as a curve


class AnnealError(MoEPrecisionError, ValueError):
    """Experts that cannot be trained through a grid: frozen, behind adapters, or sharded in a way that hides them."""


@dataclass(eq=False)
class Place:
    """One parameter and its grid."""

    module: nn.Module
    name: str
    layer: str
    projection: str
    bits: list[int]
    scale: Tensor  # (E, out, in / group), one matrix is a bank of one
    offset: Tensor
    transposed: bool
    dtype: torch.dtype
    gradients: int = 0  # that have passed so far
    lost: bool = False  # nothing was kept for the gradient of the input: it is computed with other weights

    def weight(self) -> Tensor:
        """The float parameter, as this rank holds it."""
        weight = own_parameters(self.module)[self.name]
        assert weight is not None
        return weight

    def quantized(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The weight on the grid, in the layout of the parameter; written into ``out`` if it is given."""
        out = torch.empty_like(weight) if out is None else out
        on_grid(self._bank(weight), self.bits, self.scale, self.offset, self._bank(out))
        return out

    def of_kept(self, gradient: Tensor) -> Tensor:
        """A gradient of the parameter, 0 for experts that are dropped."""
        if DROPPED not in self.bits:
            return gradient
        gradient = gradient.clone()
        bank = self._bank(gradient)
        bank[[expert for expert, bits in enumerate(self.bits) if bits == DROPPED]] = 0
        return gradient

    def codes(self) -> Tensor:
        """The weight's codes now, uint8, of evenly spaced rows; a collective under FSDP2."""
        bank = self._bank(self._whole())
        step = -(-bank.numel() // _CODES_COUNTED)
        parts = [
            codes_on_grid(bank[i, ::step], bits, self.scale[i, ::step], self.offset[i, ::step]).to(torch.uint8)
            for i, bits in enumerate(self.bits)
            if DROPPED < bits < 16
        ]
        return torch.stack(parts) if parts else torch.empty(0, dtype=torch.uint8)

    def settle(self) -> None:
        """Moves the float weight onto the grid; a collective under FSDP2."""
        _put(self.weight(), self.quantized(self._whole()))

    def _whole(self) -> Tensor:
        weight = self.weight()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    def _bank(self, weight: Tensor) -> Tensor:
        """A parameter as ``(E, out, in)``."""
        bank = weight if weight.ndim == 3 else weight.unsqueeze(0)
        return bank.transpose(1, 2) if self.transposed else bank


def put_bank(bank: Bank, values: Tensor) -> None:
    """Gives the parameters of a bank other values, ``(E, out, in)``: those of the first process; a collective."""
    values = of_first(values)
    values = values.transpose(1, 2) if bank.transposed else values
    for weight, part in zip(bank.weights, [values] if len(bank.weights) == 1 else values, strict=True):
        _put(weight.parameter(), part)


def _put(parameter: Tensor, whole: Tensor) -> None:
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole.contiguous(), parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)


class QuantizedAgain:
    """Quantized weights for backward passes, of one layer at a time."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._made: dict[Place, Tensor] = {}

    @torch.no_grad()
    def get(self, place: Place, weight: Tensor) -> Tensor:
        """The quantized weight, kept until it is another layer's turn."""
        if any(other.layer != place.layer for other in self._made):
            self.forget()
        if place not in self._made:
            self._made[place] = place.quantized(weight, self._buffers.take(weight))
        return self._made[place]

    def forget(self) -> None:
        """Drops all quantized weights: the float ones may have changed."""
        while self._made:
            self._buffers.give(self._made.popitem()[1])


@dataclass
class Saved:
    """What a backward pass will need: a tensor, or a view of a quantized weight in the form of the float one."""

    tensor: Tensor
    version: int
    place: Place | None = None
    view: tuple[Any, Any, Any] | None = None  # shape, strides, offset


class StraightThrough(torch.autograd.Function):
    """Quantized forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, place: Place, out: Tensor) -> Tensor:
        ctx.place = place
        return place.quantized(weight, out).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.place.gradients += 1
        return ctx.place.of_kept(gradient), None, None


class Cover:
    """Hooks of one module, which put quantized weights over its parameters."""

    def __init__(self, module: nn.Module, buffers: Buffers, again: QuantizedAgain) -> None:
        self.places: list[Place] = []
        self.lifted = False
        self._module, self._buffers, self._again = module, buffers, again
        self._lent: dict[int, tuple[Place, Tensor, Tensor]] = {}  # address -> place, weight, buffer
        self._saving: saved_tensors_hooks | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Installs the hooks."""
        self._handles = [
            self._module.register_forward_pre_hook(self._cover),
            self._module.register_forward_hook(self._uncover, always_call=True),
        ]

    def close(self) -> None:
        """Removes the hooks and gives the module its float weights back, even in the middle of a forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._uncover(self._module)

    def _cover(self, module: nn.Module, args: Any) -> None:
        if self.lifted:
            return
        self._again.forget()
        # checkpointing and offloading have hooks of their own: what they keep must not be reused
        reused = not torch.is_grad_enabled() or not saved_tensors_hooks_are_set()
        for place in self.places:
            weight = place.weight()
            if weight.dtype != place.dtype:
                raise AnnealError(
                    f"{place.layer!r} computes with {weight.dtype} weights and the optimizer keeps {place.dtype} ones "
                    "(FSDP2's MixedPrecisionPolicy): their codes differ. Train with autocast, or in one dtype"
                )
            buffer = self._buffers.take(weight) if reused else torch.empty_like(weight, requires_grad=False)
            values = StraightThrough.apply(weight, place, buffer)
            if values.grad_fn is not None:  # hand the gradient on at once, so that only one bank's waits in the engine
                run_first_in_backward(values.grad_fn)
            module.__dict__[place.name] = values  # found before the parameter
            if reused:
                self._lent[buffer.untyped_storage().data_ptr()] = place, weight, buffer
                place.lost = torch.is_grad_enabled() and _requires_grad(args)
        if reused and torch.is_grad_enabled():
            self._saving = saved_tensors_hooks(self._pack, self._unpack)
            self._saving.__enter__()

    def _uncover(self, module: nn.Module, args: Any = None, output: Any = None) -> None:
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
        for place in self.places:
            module.__dict__.pop(place.name, None)
        for place, _, buffer in self._lent.values():
            if not self._buffers.give(buffer):
                place.lost = False
        self._lent.clear()

    def _pack(self, tensor: Tensor) -> Saved:
        lent = self._lent.get(tensor.untyped_storage().data_ptr())
        if lent is None:  # detached: the tensor itself could hold the graph that holds it
            return Saved(tensor.detach(), version_of(tensor))
        place, weight, _ = lent
        place.lost = False
        return Saved(weight, version_of(weight), place, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def _unpack(self, saved: Saved) -> Tensor:
        if version_of(saved.tensor) != saved.version:  # autograd itself does not check behind such hooks
            what = "a tensor" if saved.place is None else f"the expert weight {saved.place.name!r}"
            raise RuntimeError(
                f"{what} that the backward pass of {self.places[0].layer!r} needs has been modified by an inplace "
                "operation since its forward pass"
            )
        if saved.place is None or saved.view is None:
            return saved.tensor
        return self._again.get(saved.place, saved.tensor).as_strided(*saved.view)


def _requires_grad(args: tuple[Any, ...]) -> bool:
    """Whether a backward pass will ask for the gradient of what a module is called with."""
    return bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
