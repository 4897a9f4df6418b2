"""Packed matrices whose scales and offsets can be trained while their codes stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import MoEPrecisionError
from ..layers.banks import Bank
from ..layers.moe_layers import MoELayer
from ..layers.router_rows import router_row_norms
from ..recording.router_norms import check_same_weights
from .buckets import Bucket, NoMatrices
from .codec.packing import unpack
from .codec.scales import compress, expand, lost_in_float16
from .kernels import Matrices
from .matrices import PackedMatrices
from .modules import PackedLinear, PackedProjection


class DistillError(MoEPrecisionError, ValueError):
    """A packed model that does not belong to the float model, or text that does not suffice."""


@dataclass
class _Matrix:
    """One packed matrix in training.

    Attributes:
        held: The matrices that it is one of.
        index: Its place there.
        codes: ``(out, in / group, group)`` uint8.
        scale: ``(out, in / group)`` float32, and `offset` alike.
        factor: Of each scale, minus one: ``(out, in / group)`` float32, with gradients.
        shift: Of each offset, in scales; the same shape.
    """

    held: PackedMatrices
    index: int
    codes: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    offset: Tensor = field(init=False)
    factor: Tensor = field(init=False)
    shift: Tensor = field(init=False)

    def __post_init__(self) -> None:
        one = self.held.matrices([self.index])
        scale, offset = one.floats()
        self.scale, self.offset = scale[0].float(), offset[0].float()
        self.codes = unpack(one.codes, self.held.bits)[0].unflatten(-1, (self.scale.shape[-1], -1))
        self.factor = torch.zeros_like(self.scale, requires_grad=True)
        self.shift = torch.zeros_like(self.scale, requires_grad=True)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets as they are now."""
        return self.scale * (1 + self.factor), self.offset + self.shift * self.scale

    def weight(self) -> Tensor:
        """``(out, in)`` float32."""
        scale, offset = self.grid()
        return torch.addcmul(offset.unsqueeze(-1), self.codes.float(), scale.unsqueeze(-1)).flatten(-2)

    @torch.no_grad()
    def store(self) -> None:
        """Rounds what was trained to what can be stored, and goes on from there; as before where it is too far off."""
        scale, offset = self.grid()
        if not lost_in_float16(scale, offset, 2**self.held.bits - 1):
            self.scale, self.offset = (expand(*compress(values)).float() for values in (scale, offset))
        self.factor.zero_()
        self.shift.zero_()

    def put(self) -> None:
        """Puts scales and offsets into the packed model."""
        self.held.leave_kernel()
        held = self.held.held()
        one = slice(self.index, self.index + 1)
        new = Matrices.of(held.codes[one], self.scale[None].half(), self.offset[None].half())
        for buffer, values in zip(held, new, strict=True):
            buffer[one] = values


class TrainableScales:
    """All packed matrices of a Mixture-of-Experts layer, as weights of the float layer.

    Args:
        layer: Of the float model.
        packed: The packed model, whose modules have the same names.

    Attributes:
        unit: Name of the module whose output is compared: it holds the router and the experts.

    Raises:
        DistillError: The packed model has other experts.
    """

    def __init__(self, layer: MoELayer, packed: nn.Module) -> None:
        self.unit = layer.name
        self._floats: dict[str, Tensor] = {}
        self._transposed: dict[str, bool] = {}
        self._matrices: dict[str, dict[int | None, _Matrix]] = {}  # parameter -> expert of a fused one, else None
        for bank in layer.banks.values():
            for weight in bank.weights:
                held = _held(weight.name, bank, layer, packed)
                self._matrices[weight.name] = {
                    expert: _Matrix(bucket, index)
                    for expert, (bucket, index) in held.items()
                    if isinstance(bucket, PackedMatrices)
                }
                dropped = [expert for expert, (bucket, _) in held.items() if isinstance(bucket, NoMatrices)]
                self._floats[weight.name] = _without(weight.parameter().detach(), dropped)
                self._transposed[weight.name] = bank.transposed

    @property
    def matrices(self) -> list[_Matrix]:
        """All of them."""
        return [matrix for of in self._matrices.values() for matrix in of.values()]

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [tensor for matrix in self.matrices for tensor in (matrix.factor, matrix.shift)]

    def weights(self) -> dict[str, Tensor]:
        """Full parameter name -> the packed values, in the float parameter's layout and dtype.

        Gradients reach `parameters`.
        """
        found = {}
        for name, matrices in self._matrices.items():
            whole = self._floats[name]
            if not matrices:
                found[name] = whole
                continue
            some = {expert: matrix.weight().to(whole.dtype) for expert, matrix in matrices.items()}
            turned = {expert: weight.T if self._transposed[name] else weight for expert, weight in some.items()}
            if None in turned:
                found[name] = turned[None]
            else:
                found[name] = torch.stack([turned.get(expert, whole[expert]) for expert in range(len(whole))])
        return found

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """Scales and offsets of all matrices, to go back to."""
        return [(matrix.scale, matrix.offset) for matrix in self.matrices]

    def go_back(self, state: list[tuple[Tensor, Tensor]]) -> None:
        """Takes what `state` returned."""
        for matrix, (scale, offset) in zip(self.matrices, state, strict=True):
            matrix.scale, matrix.offset = scale, offset


@torch.no_grad()
def check_routers(layers: list[MoELayer], packed: nn.Module) -> None:
    """Checks that a packed model is of the float model with these layers, by the routers, which packing leaves.

    Raises:
        DistillError: Its routers are others.
    """
    own = dict(packed.named_parameters(remove_duplicate=False))
    if missing := [layer.router for layer in layers if layer.router not in own]:
        raise DistillError(f"the packed model has no {missing[0]!r}: it is not of this float model")
    norms = {
        layer.name: router_row_norms(
            own[layer.router], num_experts=layer.num_experts, transposed=layer.router_transposed
        ).cpu()
        for layer in layers
    }
    check_same_weights(norms, {layer.name: layer.row_norms() for layer in layers}, "packed model", DistillError)


def _without(weight: Tensor, dropped: list[int | None]) -> Tensor:
    """The float parameter, 0 where an expert is dropped: all of it for None, else that slice."""
    if not dropped:
        return weight
    left = weight.clone()
    for expert in dropped:
        (left if expert is None else left[expert]).zero_()
    return left


def _held(name: str, bank: Bank, layer: MoELayer, packed: nn.Module) -> dict[int | None, tuple[Bucket, int]]:
    """Where the packed model holds the matrices of one float parameter: by expert of a fused one, else under None.

    Nothing for a linear layer that was left as it is.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        module = packed.get_submodule(owner)
    except AttributeError as error:
        raise DistillError(f"the packed model has no {owner!r}: it is not of this float model") from error
    shape = layer.projections[next(key for key, one in layer.banks.items() if one is bank)]
    if isinstance(module, PackedLinear):
        found: dict[int | None, tuple[Bucket, int]] = {None: (module.packed, 0)}
    elif hasattr(module, "packed"):
        projection = module.get_submodule(f"packed.{leaf}")
        assert isinstance(projection, PackedProjection)
        found = {expert: projection.place(expert) for expert in range(layer.num_experts)}
    elif isinstance(module, nn.Linear):
        found = {}
    else:
        raise DistillError(f"{owner!r} of the packed model is a {type(module).__name__} without packed experts")
    for bucket, _ in found.values():
        if bucket.shape[1:] != shape:
            raise DistillError(f"{name!r} has shape {shape}, its packed matrices {bucket.shape[1:]}")
    return found
