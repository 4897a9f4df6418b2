"""Other ways to quantize a matrix, for comparison: each gives codes, scales and offsets as ours does."""

from importlib.util import find_spec

import torch
from torch import Tensor

from moe_precision.judging.simulation import Quantizer
from moe_precision.quantize.codec.fitting import least_squares_codes, least_squares_scale, quantize_matrix


def rtn(
    weight: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest between the minimum and the maximum of each group."""
    groups = weight.float().reshape(weight.shape[0], -1, group_size)  # (out, in / group, group)
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1)
    return codes.view(weight.shape).to(torch.uint8), scale, low


def least_squares(
    weight: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The fit with the least weight error, whose gain is biased."""
    groups = weight.float().reshape(-1, group_size)
    codes = least_squares_codes(groups, bits)
    scale, offset = least_squares_scale(groups, codes)
    shape = (weight.shape[0], -1)
    return codes.view(weight.shape).to(torch.uint8), scale.view(shape), offset.view(shape)


def hqq(
    weight: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """HQQ with its default optimization (``pip install moe-precision[benchmarks]``)."""
    from hqq.core.quantize import Quantizer as HQQ

    source = weight.float().contiguous()
    packed, meta = HQQ.quantize(
        source, nbits=bits, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32
    )
    values = HQQ.dequantize(packed, meta).view_as(source).float()
    return values, torch.ones(len(values), 1), torch.zeros(len(values), 1)


def unweighted(
    weight: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours without curvature."""
    return quantize_matrix(weight, bits, group_size)


def quantizers() -> dict[str, Quantizer]:
    """By name; HQQ if it is installed."""
    found: dict[str, Quantizer] = {"round to nearest": rtn, "least squares": least_squares}
    if find_spec("hqq") is not None:
        found["HQQ"] = hqq
    return found | {"unbiased gain": unweighted, "unbiased gain, curvature": quantize_matrix}
