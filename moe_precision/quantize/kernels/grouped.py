"""Rows of many experts times their packed matrices in one launch, on GPUs: Triton on the checkpoint's own form.

Codes become weights in registers, so that a token reads the packed bytes of its experts and nothing else. Which rows an
expert has is read on the device: the host does not wait for them.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..codec.scales import BLOCK
from .base import Matrices, dequantize

_COLUMNS, _EIGHTS = 64, 16  # of the output, and eights of the input, at a time
_FEW, _MANY = 16, 32  # rows of an expert at a time: with more, registers are spilled
_WARPS = 8
_INT32 = 2**31
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}  # TF32 is allowed in float32


def fits(x: Tensor, matrices: Matrices) -> bool:
    """Whether the kernel can take this: on a GPU where Triton works, without gradients."""
    return (
        x.is_cuda
        and matrices.codes is not None
        and matrices.codes.device == x.device
        and not (x.requires_grad and torch.is_grad_enabled())
        and x.numel() < _INT32
        and matrices.codes[0].numel() < _INT32
        and works(x.device, x.dtype)
    )


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles here and gives right results, as tested on a small product."""
    if find_spec("triton") is None or dtype not in _TOLERANCE:
        return False
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            error = _error(device, dtype)
        if not error <= _TOLERANCE[dtype]:
            raise ArithmeticError(f"its products are off by {error:.2g}: please report this")
    except Exception as error:  # whatever a compiler or driver raises, or its absence
        warnings.warn(
            f"Triton does not work on {device} with {dtype} ({type(error).__name__}: {error}): packed matrices are "
            "dequantized for each product, which is slow",
            stacklevel=2,
        )
        return False
    return True


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of a small product."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 80, 3 * 8), generator=random, dtype=torch.uint8)  # 64 columns of 3 bits
    scale, offset = torch.randint(0, 256, (2, 2, 80, 2), generator=random, dtype=torch.uint8)
    ends = torch.randn(2, 80 * 2 // BLOCK, 4, generator=random, dtype=torch.float32).half()
    matrices = Matrices(*(tensor.to(device) for tensor in (codes, scale, offset, ends)))
    x, starts = (
        torch.randn(21, 64, generator=random, dtype=torch.float32).to(device, dtype),
        torch.tensor([0, 17, 21], device=device),
    )
    weights = dequantize(matrices.codes, *matrices.floats(), 3, torch.float32)
    exact = torch.cat([x[:17].float() @ weights[0].T, x[17:].float() @ weights[1].T])
    y = torch.zeros_like(exact, dtype=dtype)
    multiply(x, starts, torch.arange(2, device=device), matrices, 3, 32, y)
    return float((y - exact).norm() / exact.norm())


def multiply(
    x: Tensor, starts: Tensor, experts: Tensor, matrices: Matrices, bits: int, group_size: int, y: Tensor
) -> None:
    """See `Kernel.grouped`, of matrices as the checkpoint holds them."""
    from .triton_grouped import multiply_rows  # Triton comes with torch where torch has GPUs

    x = x.contiguous()
    count, out, groups = matrices.scale.shape
    rows_at_once = _FEW if len(x) <= _FEW * count else _MANY
    grid = (-(-out // _COLUMNS), count)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        multiply_rows[grid](
            *(x, y, starts, experts, *matrices),
            *(out, x.shape[1], groups, matrices.ends.shape[1]),
            *(bits, group_size, BLOCK, rows_at_once, _COLUMNS, _EIGHTS),
            num_warps=_WARPS,
        )


def linear(x: Tensor, matrices: Matrices, bits: int, group_size: int) -> Tensor:
    """``x @ W.T`` with one matrix, ``(..., in) -> (..., out)``."""
    flat = x.reshape(-1, x.shape[-1])
    y = flat.new_empty(len(flat), matrices.scale.shape[1])
    starts = torch.arange(2, device=x.device) * len(flat)
    multiply(flat, starts, starts[:1], matrices, bits, group_size, y)
    return y.view(*x.shape[:-1], y.shape[1])
