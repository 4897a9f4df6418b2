"""Intel's ARK kernels (package ``auto-round-lib``, extra ``moe-precision[cpu]``): 2 to 4 bits at their own width.

ARK rounds activations to int8, an error of 0.7 % of a product: it takes 16-bit activations only. Beyond 4 bits it would
have to compute in float32, where it is no faster than `native.py`.

ARK has no float offset: its part of the product is ``scale * (code - half)``. The rest, ``offset + half * scale``, is
constant within a group, so it is multiplied by the sum of the group's activations.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codec.packing import unpack
from ..codec.scales import expand
from .base import Kernel, Matrices, Request

_ALIGNED = 64  # bytes at which every matrix starts
_EMPTY = torch.empty(0)


class Ark(Kernel):
    """Blobs in ARK's own form, with scales in float32, and the rest that ARK does not add."""

    name = "ARK"

    blobs: Tensor  # (count, bytes) int8
    rest: Tensor  # (count, out, in / group) float16: offset + half * scale

    @staticmethod
    def fits(request: Request) -> bool:
        return (
            request.device == "cpu"
            and not request.exact
            and 2 <= request.bits <= 4
            and request.dtype in (torch.bfloat16, torch.float16)
            and request.out % 16 == 0
            and request.group_size % 32 == 0
            and is_intel()  # elsewhere it computes in float32, slower than `native.py`
            and find_spec("auto_round_kernel") is not None
        )

    def __init__(self, matrices: Matrices, bits: int, group_size: int) -> None:
        super().__init__(matrices, bits, group_size)
        self.keep_steps(matrices)
        half = 2 ** (bits - 1)
        blobs = []
        scales, offsets = (tensor.float() for tensor in matrices.floats())
        for codes, scale in zip(matrices.codes, scales, strict=True):
            signed = (unpack(codes, bits).short() - half).to(torch.int8).T.contiguous()  # (in, out)
            no_zero = torch.empty(0, dtype=torch.int8)
            blob = _ark().repack_quantized_weight(
                signed, scale.T.contiguous(), no_zero, group_size, *self._types, False
            )
            blobs.append(torch.nn.functional.pad(blob, (0, -len(blob) % _ALIGNED)))
        self.size = len(blob)
        self.keep(blobs=torch.stack(blobs), rest=(offsets + half * scales).half())

    @property
    def _types(self) -> tuple[str, str, str]:
        """Types of computing, weight and scale; "auto" rounds activations to int8."""
        return "auto", f"int{self.bits}", "fp32"

    def multiply(self, index: int, x: Tensor) -> Tensor:
        exact = x.float().contiguous()
        blob = self.blobs[index, : self.size]
        product = _ark().woqgemm(exact, blob, _EMPTY, self.out, self.inp, self.group_size, *self._types, False)
        sums = exact.unflatten(-1, (-1, self.group_size)).sum(-1)  # (tokens, in / group)
        return torch.addmm(product, sums, self.rest[index].float().T).to(x.dtype)

    def codes(self, index: int) -> Tensor:
        blob, shape = self.blobs[index, : self.size], (self.out, self.inp, self.group_size)
        weight = _ark().unpack_weight(blob, torch.float32, *shape, *self._types, False)  # scale * (code - half)
        scale = expand(self.scale[index], self.ends[index, :, :2]).float().unsqueeze(-1)
        steps = weight.reshape(self.out, -1, self.group_size) / scale
        return torch.where(scale > 0, steps.round() + 2 ** (self.bits - 1), 0.0).to(torch.uint8).flatten(1)


@cache
def is_intel() -> bool:
    """Whether the CPU is Intel's, for which ARK is made."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "GenuineIntel" in info.read_text(encoding="utf-8", errors="replace")


@cache
def _ark() -> Any:
    import auto_round_kernel

    return auto_round_kernel
