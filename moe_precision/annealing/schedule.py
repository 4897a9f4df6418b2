"""How long to anneal and at which learning rate: pure functions of how long a run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .soft_labels import IGNORED

LEAST_SHARE = 0.1
"""Of all steps. Near-optimal for short runs in ParetoQ (arXiv 2502.02631), and in docs/annealing-tables.md."""

_SLOWNESS = 6.7297  # the one constant that arXiv 2509.22935 fitted, over 86M to 2.2B parameters and 1 to 6 bits


def annealed_share(tokens_per_byte: float) -> float:
    """The share of all training steps that is worth annealing: a tenth, or more for a model that is trained long.

    `Compute-Optimal Quantization-Aware Training` (arXiv 2509.22935) finds that of ``S`` tokens per byte of quantized
    parameters ``exp(ln S - 6.7297 / ln S)`` are best trained on the grid. As a share that is ``exp(-6.7297 / ln S)``,
    with a mean absolute error of 0.09. It says little about short runs, where it goes to 0: a tenth is the least.

    Args:
        tokens_per_byte: Tokens of the whole training, over the bytes of all quantized weights in the file.

    Example:
        >>> [round(annealed_share(size), 2) for size in (0.5, 10, 80, 1000)]
        [0.1, 0.1, 0.22, 0.38]
    """
    if tokens_per_byte <= 1:
        return LEAST_SHARE
    return max(LEAST_SHARE, math.exp(-_SLOWNESS / math.log(tokens_per_byte)))


def cooldown_factor(done: int, steps: int) -> float:
    """What the learning rate of an annealed step is multiplied by: 1 at first, falling towards 0 as ``1 - sqrt``.

    The form is that of arXiv 2405.18392, for the end of a run at a constant rate.

    Args:
        done: Annealed steps before this one.
        steps: All annealed steps.

    Example:
        >>> [cooldown_factor(done, 4) for done in (0, 1, 4)]
        [1.0, 0.5, 0.0]
    """
    return 1.0 - math.sqrt(min(1.0, max(0.0, done / steps)))


def tokens_of(batch: Any) -> int:
    """Tokens in a training batch, padding left out; 0 where it shows none.

    Args:
        batch: Keyword arguments of a transformers model, as a mapping; else token ids, ``(B, T)``, alone or first of
            a tuple or list. Labels of another shape than ``input_ids`` are tokens of a decoder.
    """
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return 0 if batch.is_floating_point() or batch.ndim != 2 else batch.numel()
    if not isinstance(batch, Mapping):
        return 0
    found, shape = 0, None
    for prefix in ("", "decoder_"):
        ids, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
        if ids is None and (given := batch.get(f"{prefix}inputs_embeds")) is not None:
            ids = given[..., 0]
        if not isinstance(ids, Tensor):
            continue
        shape = ids.shape
        found += int((mask != 0).sum()) if isinstance(mask, Tensor) and mask.shape == shape else ids.numel()
    labels = batch.get("labels")
    if shape is not None and isinstance(labels, Tensor) and labels.shape != shape:
        found += int((labels != IGNORED).sum())
    return found
