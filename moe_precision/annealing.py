"""Training through a quantization grid: forward passes use the nearest weights on it, gradients go straight through.

Hooks put the quantized weights over the modules' parameters for the time of a forward pass, so that parameters,
optimizer and ``state_dict`` stay those of the float model, under every strategy that gives a module whole parameters.

Only one layer's quantized weights are held (one of each shape): what a backward pass needs of them is quantized again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, distribute_tensor

from .buffers import Buffers
from .moe_layers import MoELayer
from .quantize.fitting import codes_on_grid
from .quantize.grid import Grid, on_grid
from .router_norms import norms_by_layer

_CODES_COUNTED = 1 << 16  # of each parameter, about: enough for a share that a curve can show


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
                    raise AnnealError(
                        f"{weight.name!r} is frozen: it cannot move on a grid. Train the experts, or keep them packed "
                        "and train the routers alone (moe-precision fit --config recipes/recover.yaml --train routers)"
                    )


def uncover(layers: list[MoELayer]) -> None:
    """Takes off the hooks of a run that was interrupted, if there are any."""
    for layer in layers:
        for bank in layer.banks.values():
            for weight in bank.weights:
                for hook in list(weight._module._forward_pre_hooks.values()):
                    if isinstance(cover := getattr(hook, "__self__", None), _Cover):
                        cover.close()


class GridHooks:
    """Puts every expert weight on a grid during forward passes, until it is closed.

    Args:
        layers: As found by `find_moe_layers`; fused banks or a module an expert.
        grid: Their grid.

    Raises:
        AnnealError: A weight is frozen or not a plain parameter.
    """

    def __init__(self, layers: list[MoELayer], grid: Grid) -> None:
        uncover(layers)
        check_trainable(layers)
        self.grid, self._layers = grid, layers
        self._places: list[_Place] = []
        buffers = Buffers()
        again = _QuantizedAgain(buffers)
        covers: dict[nn.Module, _Cover] = {}
        for layer in layers:
            for name, bank in layer.banks.items():
                widths = grid.plan.layers[layer.name].projection_bits[name]
                scales, offsets = grid.scales[layer.name][name], grid.offsets[layer.name][name]
                for index, weight in enumerate(bank.weights):
                    part = slice(None) if len(bank.weights) == 1 else slice(index, index + 1)
                    device = weight.parameter().device
                    place = _Place(
                        module=weight._module,
                        name=weight._key,
                        layer=layer.name,
                        projection=name,
                        bits=widths[part],
                        scale=scales[part].to(device),
                        offset=offsets[part].to(device),
                        transposed=bank.transposed,
                        dtype=weight.dtype,
                    )
                    self._places.append(place)
                    covers.setdefault(place.module, _Cover(place.module, buffers, again)).places.append(place)
        self._covers = list(covers.values())
        for cover in self._covers:
            cover.attach()
        _forget_compiled()

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        for cover in self._covers:
            cover.close()
        _forget_compiled()

    def check_used(self) -> None:
        """Raises `AnnealError` if a projection of a layer has got no gradient, or a wrong one, through the grid."""
        used = {(place.layer, place.projection) for place in self._places if place.gradients and not place.lost}
        for place in self._places:
            if (place.layer, place.projection) not in used:
                raise AnnealError(
                    f"no expert of {place.layer!r} has learned through its quantized {place.projection!r}: the layer "
                    "took no part in the step, reads the weights without calling the modules that own them, or uses "
                    "gradient checkpointing inside of them; such layers cannot be annealed"
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
        """Codes that the weights have now, uint8, for counting how many change: of evenly spaced rows of every matrix.

        A collective under FSDP2.
        """
        return [place.codes() for place in self._places]

    @torch.no_grad()
    def settle(self) -> None:
        """Moves the float weights themselves onto the grid, so that they stay there when saved; a collective."""
        for place in self._places:
            place.settle()
        self.grid.router_norms = norms_by_layer(self._layers)


@dataclass(eq=False)
class _Place:
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
        weight = self.module._parameters[self.name]
        assert weight is not None
        return weight

    def quantized(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """On the grid, in the layout of the parameter; into ``out`` if it is given."""
        out = torch.empty_like(weight) if out is None else out
        on_grid(self._bank(weight), self.bits, self.scale, self.offset, self._bank(out))
        return out

    def codes(self) -> Tensor:
        bank = self._bank(self._whole())
        step = -(-bank.numel() // _CODES_COUNTED)
        parts = [
            codes_on_grid(bank[i, ::step], bits, self.scale[i, ::step], self.offset[i, ::step]).to(torch.uint8)
            for i, bits in enumerate(self.bits)
            if bits < 16
        ]
        return torch.stack(parts) if parts else torch.empty(0, dtype=torch.uint8)

    def settle(self) -> None:
        weight = self.weight()
        values = self.quantized(self._whole())
        if isinstance(weight, DTensor):
            values = distribute_tensor(values, weight.device_mesh, weight.placements)
        weight.copy_(values)

    def _whole(self) -> Tensor:
        weight = self.weight()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    def _bank(self, weight: Tensor) -> Tensor:
        """A parameter as ``(E, out, in)``."""
        bank = weight if weight.ndim == 3 else weight.unsqueeze(0)
        return bank.transpose(1, 2) if self.transposed else bank


class _QuantizedAgain:
    """Quantized weights for backward passes, of one layer at a time."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._made: dict[_Place, Tensor] = {}

    @torch.no_grad()
    def get(self, place: _Place, weight: Tensor) -> Tensor:
        """The quantized weight, kept until it is another layer's turn."""
        if any(other.layer != place.layer for other in self._made):
            self.forget()
        if place not in self._made:
            self._made[place] = place.quantized(weight, self._buffers.take(weight))
        return self._made[place]

    def forget(self) -> None:
        """The float weights may have changed."""
        while self._made:
            self._buffers.give(self._made.popitem()[1])


@dataclass
class _Saved:
    """What a backward pass will need: a tensor, or a view of a quantized weight in the form of the float one."""

    tensor: Tensor
    version: int
    place: _Place | None = None
    view: tuple[Any, Any, Any] | None = None  # shape, strides, offset


class _StraightThrough(torch.autograd.Function):
    """Quantized forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, place: _Place, out: Tensor) -> Tensor:
        ctx.place = place
        return place.quantized(weight, out).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.place.gradients += 1
        return gradient, None, None


class _Cover:
    """Hooks of one module, which put quantized weights over its parameters."""

    def __init__(self, module: nn.Module, buffers: Buffers, again: _QuantizedAgain) -> None:
        self.places: list[_Place] = []
        self.lifted = False
        self._module, self._buffers, self._again = module, buffers, again
        self._lent: dict[int, tuple[_Place, Tensor, Tensor]] = {}  # address -> place, weight, buffer
        self._saving: saved_tensors_hooks | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles = [
            self._module.register_forward_pre_hook(self._cover),
            self._module.register_forward_hook(self._uncover, always_call=True),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._uncover(self._module)

    def _cover(self, module: nn.Module, args: Any) -> None:
        if self.lifted:
            return
        self._again.forget()
        # checkpointing and offloading have hooks of their own: what they keep must not be used again
        reused = not torch.is_grad_enabled() or not _hooks_are_set()
        for place in self.places:
            weight = place.weight()
            if weight.dtype != place.dtype:
                raise AnnealError(
                    f"{place.layer!r} computes with {weight.dtype} weights and the optimizer keeps {place.dtype} ones "
                    "(FSDP2's MixedPrecisionPolicy): their codes differ. Train with autocast, or in one dtype"
                )
            buffer = self._buffers.take(weight) if reused else torch.empty_like(weight, requires_grad=False)
            values = _StraightThrough.apply(weight, place, buffer)
            if values.grad_fn is not None:  # hand the gradient on at once, so that only one bank's waits in the engine
                values.grad_fn._set_sequence_nr(2**63 - 1)
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

    def _pack(self, tensor: Tensor) -> _Saved:
        lent = self._lent.get(tensor.untyped_storage().data_ptr())
        if lent is None:  # detached: the tensor itself could hold the graph that holds it
            return _Saved(tensor.detach(), tensor._version)
        place, weight, _ = lent
        place.lost = False
        return _Saved(weight, weight._version, place, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def _unpack(self, saved: _Saved) -> Tensor:
        if saved.tensor._version != saved.version:  # autograd itself does not look behind such hooks
            what = "a tensor" if saved.place is None else f"the expert weight {saved.place.name!r}"
            raise RuntimeError(
                f"{what} that the backward pass of {self.places[0].layer!r} needs has been modified by an inplace "
                "operation since its forward pass"
            )
        if saved.place is None or saved.view is None:
            return saved.tensor
        return self._again.get(saved.place, saved.tensor).as_strided(*saved.view)


def _forget_compiled() -> None:
    """Compiled code does not see hooks that come or go: it is compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _hooks_are_set() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _requires_grad(args: tuple[Any, ...]) -> bool:
    """Whether a backward pass will ask for the gradient of what a module is called with."""
    return bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
