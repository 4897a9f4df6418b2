"""Dense packing of codes: eight codes of b bits are b bytes, so 3-bit codes cost exactly 3 bits.

Little endian: code k of eight occupies bits ``b * k`` to ``b * (k + 1) - 1`` of the b bytes read as one number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the last dimension.

    Args:
        codes: ``(..., n)`` of integers below ``2**bits``, n a multiple of 8.
        bits: Width of a code, 1 to 8.

    Returns:
        ``(..., n * bits / 8)`` uint8.
    """
    eights = codes.reshape(*codes.shape[:-1], -1, 8)  # (..., n / 8, 8)
    words = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for k in range(8):
        words |= eights[..., k].long() << (bits * k)
    packed = torch.stack([(words >> (8 * byte)).to(torch.uint8) for byte in range(bits)], dim=-1)
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: ``(..., n * bits / 8)`` uint8 -> ``(..., n)`` uint8."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    if bits in (1, 2, 4):  # a code never crosses a byte
        return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    parts = packed.reshape(*packed.shape[:-1], -1, bits)  # (..., n / 8, b)
    words = torch.zeros(parts.shape[:-1], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= parts[..., byte].long() << (8 * byte)
    return torch.stack([((words >> (bits * k)) & mask).to(torch.uint8) for k in range(8)], dim=-1).flatten(-2)
