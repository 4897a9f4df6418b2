"""What every kernel has in common, and the definition of a packed weight that all of them are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..codec.packing import pack, unpack
from ..codec.scales import compress, expand


class Matrices(NamedTuple):
    """A bucket of packed matrices as the checkpoint holds it.

    Attributes:
        codes: ``(count, out, in * bits / 8)`` uint8.
        scale: ``(count, out, in / group)`` uint8, steps between the ends of a block of groups: `scales.expand`.
        offset: The same shape and dtype.
        ends: ``(count, blocks, 4)`` float16: least and greatest scale, least and greatest offset.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    ends: Tensor

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, offset: Tensor) -> Matrices:
        """Makes it from packed codes, and scales and offsets that are on stored steps.

        Raises:
            ValueError: They are not.
        """
        both = torch.stack([scale, offset])
        steps, ends = compress(both)
        matrices = cls(codes, steps[0], steps[1], torch.cat([ends[0], ends[1]], dim=-1))
        if not torch.equal(expand(steps, ends), both):
            raise ValueError("scales and offsets are not on steps that can be stored: take `scales.stored_scales`")
        return matrices

    def floats(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets, each ``(count, out, in / group)`` float16."""
        return expand(self.scale, self.ends[..., :2]), expand(self.offset, self.ends[..., 2:])


class Request(NamedTuple):
    """What a kernel has to multiply.

    Attributes:
        device: Type of the device.
        dtype: Dtype of the activations.
        training: Gradients flow through the product, so that the float weight is needed again and again.
        bits: Width of a code.
        out: Rows of a matrix.
        inp: Columns of a matrix.
        group_size: Weights that share a scale and an offset.
        exact: Activations are to be multiplied as they are, not rounded to int8.
    """

    device: str
    dtype: torch.dtype
    training: bool
    bits: int
    out: int
    inp: int
    group_size: int
    exact: bool = False


class Kernel(nn.Module):
    """A bucket of matrices in the form that one kernel needs. Its buffers are never saved."""

    name: ClassVar[str]

    scale: Tensor
    offset: Tensor
    ends: Tensor

    def __init__(self, matrices: Matrices, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.count, self.out = matrices.codes.shape[:2]
        self.inp = matrices.scale.shape[2] * group_size

    @staticmethod
    def fits(request: Request) -> bool:
        """Whether the kernel can multiply this, here and now."""
        raise NotImplementedError

    @staticmethod
    def wastes_memory(request: Request) -> bool:
        """Whether its form is much larger than the packed codes."""
        return False

    def linear(self, index: int, x: Tensor) -> Tensor:
        """``x @ W.T`` with the matrix at ``index``, ``(..., in) -> (..., out)``."""
        if x.numel() == 0:  # an expert without tokens
            return x.new_empty(*x.shape[:-1], self.out)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return self.multiply(index, flat).view(*x.shape[:-1], self.out)

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """Does `linear` for contiguous ``x`` ``(tokens, in)``."""
        raise NotImplementedError

    @classmethod
    def grouped(cls, buckets: Sequence[tuple[Kernel, Tensor]], x: Tensor, starts: Tensor, y: Tensor) -> None:
        """Writes each row's product with the matrix of its expert; rows of other experts are left as they are.

        Args:
            buckets: Kernels of this class, at least one, each with the experts whose matrices it holds: ``(count,)``
                int64. All matrices have one shape and one group size; widths differ.
            x: ``(rows, in)``, those of expert 0 first.
            starts: ``(experts of the layer + 1,)`` int64: where the rows of each expert begin, and where all end.
            y: ``(rows, out)`` of the dtype of ``x``, contiguous.
        """
        for kernel, experts in buckets:
            for index, rows in spans(starts, experts):
                y[rows] = kernel.linear(index, x[rows])

    def matrix(self, index: int) -> Matrices:
        """One matrix as the checkpoint holds it, bit for bit: a bucket of one."""
        one = slice(index, index + 1)
        codes = pack(self.codes(index).view(1, self.out, self.inp), self.bits)
        return Matrices(codes, self.scale[one], self.offset[one], self.ends[one])

    def float_matrix(self, index: int) -> Tensor:
        """One float matrix, ``(out, in)`` float32: what `dequantize` gives for `matrix`."""
        one = self.matrix(index)
        return dequantize(one.codes, *one.floats(), self.bits, torch.float32)[0]

    def keep_steps(self, matrices: Matrices) -> None:
        """Keeps scales and offsets as the checkpoint holds them, for kernels whose own are rounded."""
        self.keep(scale=matrices.scale, offset=matrices.offset, ends=matrices.ends)

    def codes(self, index: int) -> Tensor:
        """The codes of one matrix, ``(out, in)`` uint8."""
        raise NotImplementedError

    def keep(self, **tensors: Tensor) -> None:
        """Holds tensors that move with the module and are not saved."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def spans(starts: Tensor, experts: Tensor) -> list[tuple[int, slice]]:
    """Matrices whose experts have rows, and the rows."""
    bounds = starts.tolist()
    of_each = ((index, slice(bounds[expert], bounds[expert + 1])) for index, expert in enumerate(experts.tolist()))
    return [(index, rows) for index, rows in of_each if rows.start < rows.stop]


def dequantize(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The float matrix ``scale * code + offset``, computed in float32 and rounded once to ``dtype``.

    Args:
        packed: ``(..., out, in * bits / 8)`` uint8.
        scale: ``(..., out, in / group)`` float16.
        offset: The same shape and dtype.
        bits: Width of a code.
        dtype: Dtype of the result.

    Returns:
        ``(..., out, in)``.
    """
    return scaled(unpack(packed, bits), scale, offset).to(dtype)


def scaled(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``scale * code + offset`` in float32, for codes ``(..., out, in)`` and scales ``(..., out, in / group)``."""
    groups = codes.view(*scale.shape, -1).float()  # (..., out, in / group, group)
    return groups.mul_(scale.float().unsqueeze(-1)).add_(offset.float().unsqueeze(-1)).view(codes.shape)
