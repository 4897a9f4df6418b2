"""What every kernel has in common, and the definition of a packed weight that all of them are tested against."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..packing import unpack


class Matrices(NamedTuple):
    """A bucket of packed matrices as the checkpoint holds it.

    Attributes:
        codes: ``(count, out, in * bits / 8)`` uint8.
        scale: ``(count, out, in / group)`` float16.
        offset: The same shape and dtype.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


class Request(NamedTuple):
    """What a kernel has to multiply.

    Attributes:
        device: Type of the device.
        dtype: Dtype of the activations.
        training: Gradients flow through the product, so that the float weight is wanted again and again.
        bits: Width of a code.
        out: Rows of a matrix.
        inp: Columns of a matrix.
        group_size: Weights that share a scale and an offset.
    """

    device: str
    dtype: torch.dtype
    training: bool
    bits: int
    out: int
    inp: int
    group_size: int


class Kernel(nn.Module):
    """A bucket of matrices in the form that one kernel wants. Its buffers are in no checkpoint."""

    name: ClassVar[str]

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
        flat = x.reshape(-1, x.shape[-1])
        return self.multiply(index, flat).view(*x.shape[:-1], -1)

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """The same for ``(tokens, in)``."""
        raise NotImplementedError

    def matrix(self, index: int) -> Matrices:
        """One matrix as the checkpoint holds it, bit for bit: a bucket of one."""
        raise NotImplementedError

    def keep(self, **tensors: Tensor) -> None:
        """Holds tensors that move with the module and are not saved."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


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
