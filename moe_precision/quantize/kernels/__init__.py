"""Multiplying by packed matrices: which kernel takes a bucket of them and keeps it, only in its own form.

On a CPU, the first that fits: Intel's ARK (`ark.py`, if ``auto-round-lib`` is installed), a kernel in C++ that is
compiled at its first use (`native.py`; up to 4 bits it rounds 16-bit activations to int8, unless `set_activations`
says otherwise), torch's int4 kernel where there is no compiler (`int4.py`, up to 4 bits), and
otherwise none: the matrix needed is dequantized and multiplied. On a GPU a kernel in Triton multiplies a bucket in
one launch (`grouped.py`); without Triton, those of its matrices that have tokens are dequantized for a grouped product.
"""

from __future__ import annotations

from .ark import Ark
from .base import Kernel, Matrices, Request, dequantize, scaled, spans
from .int4 import Int4
from .native import Native, NativeInt8

__all__ = ["KERNELS", "Kernel", "Matrices", "Request", "choose", "dequantize", "scaled", "spans"]

KERNELS: tuple[type[Kernel], ...] = (Ark, NativeInt8, Native, Int4)


def choose(request: Request) -> type[Kernel] | None:
    """The kernel that keeps and multiplies a bucket of matrices; None to dequantize."""
    fitting = [kernel for kernel in KERNELS if kernel.fits(request)]
    narrow = [kernel for kernel in fitting if not kernel.wastes_memory(request)]
    return next(iter(narrow + fitting), None)
