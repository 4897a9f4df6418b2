"""Multiplying by a packed matrix: torch's int4 CPU kernel where it fits, else dequantize this one matrix and multiply.

The int4 kernel holds 1- to 4-bit codes exactly; it takes bfloat16 activations and rounds scales and offsets to
bfloat16, which costs what rounding the weight itself to bfloat16 would. torch's int8 kernel never fits: it takes one
symmetric scale a row, and these matrices have a scale and an offset for each group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import unpack

_INT4_GROUPS = (32, 64, 128, 256)


def dequantize(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The float matrix ``scale * code + offset``, computed in float32 and rounded once to ``dtype``.

    Args:
        packed: ``(out, in * bits / 8)`` uint8.
        scale: ``(out, in / group)`` float16.
        offset: The same shape and dtype.
        bits: Width of a code.
        dtype: Dtype of the result.

    Returns:
        ``(out, in)``.
    """
    return scaled(unpack(packed, bits), scale, offset).to(dtype)


def scaled(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``scale * code + offset`` in float32, for codes ``(out, in)`` and scales ``(out, in / group)``."""
    groups = codes.view(*scale.shape, -1).float()  # (out, in / group, group)
    return groups.mul_(scale.float().unsqueeze(-1)).add_(offset.float().unsqueeze(-1)).view(codes.shape)


def int4_fits(x: Tensor, rows: int, bits: int, group_size: int) -> bool:
    """Whether torch's int4 kernel can multiply this input by a matrix of ``rows`` rows."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and bits <= 4
        and rows % 16 == 0
        and group_size in _INT4_GROUPS
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    )


def to_int4(packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same matrix in the form that torch's int4 kernel wants.

    The kernel computes ``(q - 8) * scale + zero`` with q from 0 to 15. Codes are placed in the middle of that range,
    so that ``zero`` stays near the group's mean and loses nothing to bfloat16.

    Returns:
        The packed weight, and scales with zeros ``(in / group, out, 2)`` bfloat16.
    """
    half = 2 ** (bits - 1)
    codes = unpack(packed, bits).int() + (8 - half)  # (out, in)
    zero = offset.float() + half * scale.float()
    scales_and_zeros = torch.stack([scale.float().T, zero.T], dim=-1).bfloat16().contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales_and_zeros


def linear_int4(x: Tensor, weight: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    """``x @ W.T`` for bfloat16 ``x`` of shape ``(..., in)`` and a weight from `to_int4`."""
    flat = x.reshape(-1, x.shape[-1])
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, group_size, scales_and_zeros)
    return product.view(*x.shape[:-1], -1)


def linear(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """``x @ W.T`` by dequantizing the one matrix to the dtype of ``x``, ``(..., in)``."""
    return F.linear(x, dequantize(packed, scale, offset, bits, x.dtype))
