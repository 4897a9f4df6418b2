"""What holds the equal matrices of one width: packed, float, or nothing where experts are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..plans.widths import DROPPED
from .codec.fitting import Fit, quantize_matrices
from .matrices import DenseMatrices, PackedMatrices


class NoMatrices(nn.Module):
    """``count`` matrices of experts that are dropped: nothing is stored, and every product is 0."""

    bits = DROPPED

    def __init__(self, count: int, out: int, inp: int) -> None:
        super().__init__()
        self.shape = count, out, inp

    def put(self, indices: Sequence[int], weights: Tensor, fit: Fit = quantize_matrices) -> None:
        """Lets go of ``weights``."""

    def weight(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix at ``index``, ``(out, in)``: 0, on the default device."""
        return torch.zeros(self.shape[1:], dtype=dtype)

    def described(self, dtype: torch.dtype) -> str:
        """Number and shape, in the words of `PackedMatrices.described`."""
        count, out, inp = self.shape
        return f"dropped, {count} matrices of {out} x {inp}"

    def linear(self, index: int, x: Tensor) -> Tensor:
        """0, ``(..., in) -> (..., out)``, with a graph where ``x`` has one."""
        zero = x.new_zeros(*x.shape[:-1], self.shape[1])
        return zero + x[..., :0].sum() if x.requires_grad and torch.is_grad_enabled() else zero

    def kernel_for(self, x: Tensor) -> None:
        """None: there is nothing to multiply."""

    def grouped(self, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor) -> None:
        """Leaves ``y`` as it is: see `PackedMatrices.grouped`."""


Bucket = PackedMatrices | DenseMatrices | NoMatrices


def bucket_of(
    bits: int, count: int, out: int, inp: int, group_size: int, dtype: torch.dtype, device: Any = None
) -> Bucket:
    """Empty places for ``count`` matrices ``(out, in)`` of one width; ``dtype`` is of those at 16 bits."""
    if bits == DROPPED:
        return NoMatrices(count, out, inp)
    if bits == 16:
        return DenseMatrices(count, out, inp, dtype, device)
    return PackedMatrices(count, out, inp, bits, group_size, device)
