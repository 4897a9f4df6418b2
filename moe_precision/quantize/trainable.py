"""Packed matrices whose scales and offsets can be trained while their codes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MoEPrecisionError
from ..layers.banks import Bank
from ..layers.moe_layers import MoELayer
from ..plans.widths import DROPPED
from ..recording.processes import of_first
from .buckets import Bucket, NoMatrices
from .codec.fitting import Fit
from .codec.packing import pack, unpack
from .codec.scales import compress, expand, lost_in_float16
from .kernels import Matrices
from .matrices import DenseMatrices, PackedMatrices
from .modules import PackedLinear, PackedProjection
from .replace import Target


class DistillError(MoEPrecisionError, ValueError):
    """A packed model that does not belong to the float model, or text that does not suffice."""


@dataclass
class Matrix:
    """One packed matrix in training.

    Attributes:
        bits: Width of a code.
        packed: ``(out, in * bits / 8)`` uint8, see `pack`.
        scale: ``(out, in / group)`` float32, and `offset` alike.
        place: Where it is in a packed model: the matrices that it is one of, and its index.
        factor: Of each scale, minus one: ``(out, in / group)`` float32, with gradients.
        shift: Of each offset, in scales; the same shape.
    """

    bits: int
    packed: Tensor
    scale: Tensor
    offset: Tensor
    place: tuple[PackedMatrices, int] | None = None
    factor: Tensor = field(init=False)
    shift: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.factor = torch.zeros_like(self.scale, requires_grad=True)
        self.shift = torch.zeros_like(self.scale, requires_grad=True)

    @classmethod
    def at(cls, held: PackedMatrices, index: int) -> Matrix:
        """One of a packed model."""
        one = held.matrices([index])
        scale, offset = one.floats()
        return cls(held.bits, one.codes[0], scale[0].float(), offset[0].float(), (held, index))

    @classmethod
    def fitted(cls, weight: Tensor, bits: int, group_size: int, fit: Fit) -> Matrix:
        """A float matrix ``(out, in)``, quantized."""
        codes, scale, offset = fit(weight.unsqueeze(0), bits, group_size)
        return cls(bits, pack(codes[0], bits), scale[0].float(), offset[0].float())

    @property
    def codes(self) -> Tensor:
        """``(out, in / group, group)`` uint8."""
        codes: Tensor = unpack(self.packed, self.bits).unflatten(-1, (self.scale.shape[-1], -1))
        return codes

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets as they are now."""
        return self.scale * (1 + self.factor), self.offset + self.shift * self.scale

    def weight(self) -> Tensor:
        """``(out, in)`` float32."""
        scale, offset = self.grid()
        return torch.addcmul(offset.unsqueeze(-1), self.codes.float(), scale.unsqueeze(-1)).flatten(-2)

    def take_first(self) -> None:
        """Takes the codes, scales and offsets of the first process; a collective."""
        self.packed, self.scale, self.offset = map(of_first, (self.packed, self.scale, self.offset))

    @torch.no_grad()
    def store(self) -> None:
        """Rounds what was trained to what can be stored, and goes on from there; as before where it is too far off."""
        scale, offset = self.grid()
        if not lost_in_float16(scale, offset, 2**self.bits - 1):
            self.scale, self.offset = (expand(*compress(values)).float() for values in (scale, offset))
        self.factor.zero_()
        self.shift.zero_()

    def put(self) -> None:
        """Puts scales and offsets into the packed model that it is from."""
        assert self.place is not None
        held, index = self.place
        held.leave_kernel()
        buffers, one = held.held(), slice(index, index + 1)
        new = Matrices.of(buffers.codes[one], self.scale[None].half(), self.offset[None].half())
        for buffer, values in zip(buffers, new, strict=True):
            buffer[one] = values


OfExperts = dict[int | None, Matrix | None]  # expert, or None for a parameter that is one matrix -> None if dropped


class TrainableScales:
    """All packed matrices of a Mixture-of-Experts layer, as weights of the float layer.

    Args:
        layer: Of the float model.
        matrices: Name of a parameter -> what became of its experts' matrices. Experts at 16 bits are left out.

    Attributes:
        layer: The layer.
        unit: Name of the module whose output is compared: it holds the router and the experts.
        is_float: All experts are at 16 bits.
    """

    def __init__(self, layer: MoELayer, matrices: dict[str, OfExperts]) -> None:
        self.layer, self.unit = layer, layer.name
        self._matrices = {name: {e: one for e, one in of.items() if one is not None} for name, of in matrices.items()}
        dropped = {name: [e for e, one in of.items() if one is None] for name, of in matrices.items()}
        self.is_float = not any(self._matrices.values()) and not any(dropped.values())
        weights = [(weight, bank.transposed) for bank in layer.banks.values() for weight in bank.weights]
        self._floats = {one.name: _without(one.parameter().detach(), dropped[one.name]) for one, _ in weights}
        self._transposed = {weight.name: transposed for weight, transposed in weights}

    @classmethod
    def of_packed(cls, layer: MoELayer, packed: nn.Module) -> TrainableScales:
        """Those of a packed model, whose modules have the same names.

        Raises:
            DistillError: The packed model has other experts.
        """
        banks = layer.banks.values()
        return cls(layer, {w.name: _matrices(w.name, bank, layer, packed) for bank in banks for w in bank.weights})

    @classmethod
    @torch.no_grad()
    def fitted(cls, layer: MoELayer, targets: Mapping[str, Target], group_size: int) -> TrainableScales:
        """Those of a float layer, quantized; one float matrix at a time.

        Args:
            layer: The layer.
            targets: Name of a parameter -> what is to become of it, as `find_targets` lists them.
            group_size: Weights that share a scale and an offset.
        """
        found: dict[str, OfExperts] = {}
        for bank in layer.banks.values():
            for place, weight in enumerate(bank.weights):
                matrices: OfExperts = {}
                found[weight.name] = matrices
                if (target := targets.get(weight.name)) is None:
                    continue
                for expert, bits in zip(range(layer.num_experts) if layer.fused else [place], target.bits, strict=True):
                    key = expert if layer.fused else None
                    if bits == DROPPED:
                        matrices[key] = None
                    elif bits != 16:
                        matrices[key] = Matrix.fitted(bank.read(expert), bits, group_size, target.fits([expert]))
        return cls(layer, found)

    @property
    def matrices(self) -> list[Matrix]:
        """All of them."""
        return [matrix for of in self._matrices.values() for matrix in of.values()]

    def held(self, projection: str, group_size: int) -> dict[str, Tensor]:
        """``scales``, ``offsets``, ``codes`` and ``sums`` of one projection, as `Grid` holds them."""
        bank, count = self.layer.banks[projection], self.layer.num_experts
        if self.layer.fused:
            matrices = [self._matrices[bank.weights[0].name].get(expert) for expert in range(count)]
        else:
            matrices = [self._matrices[weight.name].get(None) for weight in bank.weights]
        out, inp = bank.shape
        left = torch.zeros(
            out, inp // group_size, dtype=torch.float32, device=bank.weights[0].parameter().device
        )  # at 16 bits
        return {
            "scales": torch.stack([left if one is None else one.scale for one in matrices]).half(),
            "offsets": torch.stack([left if one is None else one.offset for one in matrices]).half(),
            "codes": torch.cat(
                [torch.empty(0, dtype=torch.uint8), *(one.packed.flatten().cpu() for one in matrices if one)]
            ),
            "sums": torch.stack([weight.float().sum(1) for weight in bank.matrices()]),
        }

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [tensor for matrix in self.matrices for tensor in (matrix.factor, matrix.shift)]

    def weights(self, in_full: bool = False) -> dict[str, Tensor]:
        """Full parameter name -> the packed values, in the float parameter's layout.

        Gradients reach `parameters`.

        Args:
            in_full: In float32 in place of half precision; else in the parameter's dtype.
        """
        found = {}
        for name, matrices in self._matrices.items():
            whole = self._floats[name]
            whole = full(whole) if in_full else whole
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


def full(value: Any) -> Any:
    """A tensor of half precision in float32; anything else as it is."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _without(weight: Tensor, dropped: list[int | None]) -> Tensor:
    """The float parameter, 0 where an expert is dropped: all of it for None, else that slice."""
    if not dropped:
        return weight
    left = weight.clone()
    for expert in dropped:
        (left if expert is None else left[expert]).zero_()
    return left


def _matrices(name: str, bank: Bank, layer: MoELayer, packed: nn.Module) -> OfExperts:
    """What became of one float parameter in a packed model: of each expert of a fused one, else under None.

    Nothing for experts at 16 bits.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        module = packed.get_submodule(owner)
    except AttributeError as error:
        raise DistillError(f"the packed model has no {owner!r}: it is not of this float model") from error
    shape = layer.projections[next(key for key, one in layer.banks.items() if one is bank)]
    if isinstance(module, PackedLinear):
        held: dict[int | None, tuple[Bucket, int]] = {None: (module.packed, 0)}
    elif hasattr(module, "packed"):
        projection = module.get_submodule(f"packed.{leaf}")
        assert isinstance(projection, PackedProjection)
        held = {expert: projection.place(expert) for expert in range(layer.num_experts)}
    elif isinstance(module, nn.Linear):
        held = {}
    else:
        raise DistillError(f"{owner!r} of the packed model is a {type(module).__name__} without packed experts")
    for bucket, _ in held.values():
        if bucket.shape[1:] != shape:
            raise DistillError(f"{name!r} has shape {shape}, its packed matrices {bucket.shape[1:]}")
    return {
        expert: None if isinstance(bucket, NoMatrices) else Matrix.at(bucket, index)
        for expert, (bucket, index) in held.items()
        if not isinstance(bucket, DenseMatrices)
    }
