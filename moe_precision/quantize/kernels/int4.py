"""torch's int4 kernel for CPUs: bfloat16 activations, up to 4 bits, with a float scale and a float zero per group.

It holds 1- to 4-bit codes exactly, each in four bits, and rounds scales and zeros to bfloat16, which costs what
rounding the weight itself to bfloat16 would. torch's int8 kernel never fits: it takes one symmetric scale per row, and
these matrices have a scale and an offset per group.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...compat import has_int4_kernel, multiply_int4, pack_int4
from ..codec.packing import unpack
from .base import Kernel, Matrices, Request

_GROUPS = (32, 64, 128, 256)


class Int4(Kernel):
    """The kernel computes ``(q - 8) * scale + zero`` with q from 0 to 15.

    Codes are placed in the middle of that range, so that ``zero`` stays near the group's mean and loses nothing to
    bfloat16.
    """

    name = "torch int4"

    weight: Tensor  # (count, ...) in torch's own order
    scales_and_zeros: Tensor  # (count, in / group, out, 2) bfloat16

    @staticmethod
    def fits(request: Request) -> bool:
        return (
            request.device == "cpu"
            and request.dtype == torch.bfloat16
            and request.bits <= 4
            and request.out % 16 == 0
            and request.group_size in _GROUPS
            and not request.training  # getting the weight back is slow
            and has_int4_kernel()
        )

    @staticmethod
    def wastes_memory(request: Request) -> bool:
        return request.bits < 4

    def __init__(self, matrices: Matrices, bits: int, group_size: int) -> None:
        super().__init__(matrices, bits, group_size)
        self.keep_steps(matrices)
        half = 2 ** (bits - 1)
        self.first = 8 - half  # the kernel's code for code 0
        weight = torch.stack([pack_int4(unpack(codes, bits).int() + self.first) for codes in matrices.codes])
        scale, offset = (tensor.float().mT for tensor in matrices.floats())
        self.keep(weight=weight, scales_and_zeros=torch.stack([scale, offset + half * scale], dim=-1).bfloat16())

    def multiply(self, index: int, x: Tensor) -> Tensor:
        weight, both = self.weight[index], self.scales_and_zeros[index]
        return multiply_int4(x, weight, self.group_size, both)

    def codes(self, index: int) -> Tensor:
        held = self.weight[index].flatten()
        codes = torch.empty(self.out * self.inp, dtype=torch.uint8)
        codes[_order(self.out, self.inp)] = torch.stack([held & 15, held >> 4], dim=-1).flatten() - self.first
        return codes.view(self.out, self.inp)


@lru_cache(maxsize=1)  # four bytes per weight; matrices of one shape are given back together
def _order(out: int, inp: int) -> Tensor:
    """Where each nibble of the packed form comes from, as flat positions in ``(out, in)``, int32.

    The order depends on the CPU, and torch does not document it: positions are packed themselves, four bits at a time.
    """
    position = torch.arange(out * inp, dtype=torch.int32).view(out, inp)
    found = torch.zeros(out * inp, dtype=torch.int32)
    for shift in range(0, (out * inp - 1).bit_length(), 4):
        held = pack_int4((position >> shift) & 15).flatten()
        found |= torch.stack([held & 15, held >> 4], dim=-1).flatten().int() << shift
    return found
