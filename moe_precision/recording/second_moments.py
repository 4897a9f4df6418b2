"""Curvature from an optimizer that has trained the experts: it holds a running mean of every squared gradient.

That second moment estimates the diagonal of the empirical Fisher matrix, at no cost beyond reading it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..layers.module_tree import Weight
from ..layers.moe_layers import MoELayer
from .curvature import Curvature, CurvatureError, Means, row_and_column_means

_ADAPTIVE = ("betas", "beta2_decay", "decay_rate")  # in groups of Adam, of torch's Adafactor and of transformers'
_BNB_BLOCK = 256  # weights that share a scale in bitsandbytes' optimizer state


def curvature_of(layers: list[MoELayer], optimizers: Iterable[Any]) -> Curvature:
    """Reads the second moments of all expert weights from Adam-like optimizers; a collective under FSDP2.

    Supported optimizers: Adam and AdamW (fused, and torchao's in 8 and 4 bits), Adafactor, whose state is these very
    means, and bitsandbytes' 8-bit Adam.

    The optimizer skips an expert with parameters of its own in a step where it got no token, so that its moment is a
    mean over fewer steps. It is scaled by the share of steps that the expert took part in, which puts it on the scale
    of a slice of a fused bank, whose gradient in such a step is zero.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Optimizers that have taken a step; Lightning's or accelerate's wrappers are looked through.

    Raises:
        CurvatureError: An expert weight has no second moment in any of them: the optimizer is of
            another kind, the experts are frozen, or its state is a flat shard (FSDP1, DeepSpeed).
    """
    moments = _second_moments(optimizers)

    def means_of(weight: Weight) -> Means | None:
        shape = weight.shape
        found = moments.get(id(weight.parameter()), ())
        if found is None:
            return None
        if not found or tuple(found[0].shape) != shape[:-1] or tuple(found[1].shape) != (*shape[:-2], shape[-1]):
            raise CurvatureError(
                f"the optimizer has no second moment of shape {shape} for {weight.name!r}: curvature is read from "
                "Adam, AdamW and Adafactor with whole state. Are the experts frozen, is this another optimizer, or is "
                "its state in flat shards (FSDP1, DeepSpeed)? curvature_batches=N takes squared gradients instead"
            )
        return found

    return Curvature.of(layers, means_of)


def _second_moments(optimizers: Iterable[Any]) -> dict[int, Means | None]:
    """Parameter id -> means of its second moment; None for a parameter in training that never had a gradient."""
    found: dict[int, tuple[Means, float]] = {}
    idle: list[int] = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            beta = float(group.get("betas", (0.0, 0.0))[1])
            for parameter in group["params"]:
                state = inner.state.get(parameter, {})
                step = float(state.get("step", 0))
                means = _means_in(state, parameter) if parameter.ndim >= 2 else None
                if means is not None:
                    unbiased = 1 - beta**step if step and beta else 1.0
                    found[id(parameter)] = ((means[0] / unbiased, means[1] / unbiased), step)
                elif not state and parameter.requires_grad and any(key in group for key in _ADAPTIVE):
                    idle.append(id(parameter))
    most = max((step for _, step in found.values()), default=0.0) or 1.0
    moments: dict[int, Means | None] = dict.fromkeys(idle)
    for key, (means, step) in found.items():
        share = (step or most) / most
        moments[key] = (means[0] * share, means[1] * share)
    return moments


def _means_in(state: dict[str, Any], parameter: Tensor) -> Means | None:
    """Means of a second moment in the form that each optimizer keeps it, float32 on the CPU."""
    if isinstance(moment := state.get("exp_avg_sq"), Tensor):  # Adam
        if hasattr(moment, "dequantize") and hasattr(moment, "block_size"):  # torchao's
            moment = moment.dequantize()
        return row_and_column_means(moment) if moment.is_floating_point() and moment.ndim >= 2 else None
    for rows, columns in (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")):  # Adafactor, torch's and HF's
        if isinstance(state.get(rows), Tensor):
            leading, inp = parameter.shape[:-1], (*parameter.shape[:-2], parameter.shape[-1])
            return state[rows].float().cpu().reshape(leading), state[columns].float().cpu().reshape(inp)
    if isinstance(state.get("state2"), Tensor) and state["state2"].dtype == torch.uint8:  # bitsandbytes' Adam8bit
        from bitsandbytes.functional import dequantize_blockwise

        absmax, code = state["absmax2"], state["qmap2"]
        moment = dequantize_blockwise(state["state2"], absmax=absmax, code=code, blocksize=_BNB_BLOCK)
        return row_and_column_means(moment.view(parameter.shape))
    if isinstance(state.get("state2"), Tensor):  # its float32 form, for small tensors
        return row_and_column_means(state["state2"].view(parameter.shape))
    return None
