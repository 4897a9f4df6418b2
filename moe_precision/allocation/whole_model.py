"""What of a budget for the whole model is left for its routed experts."""

from __future__ import annotations

import os
from dataclasses import replace

from torch import nn

from ..checkpoints.checkpoint import Checkpoint, opened
from ..layers.module_tree import root_model
from ..plans.numbers import AllocationError
from ..plans.settings import PlanSettings
from ..quantize.sizes import GIB, ModelSizes


def with_rest(
    settings: PlanSettings,
    model: nn.Module | Checkpoint | str | os.PathLike[str],
    non_expert_bits: int | None = None,
) -> PlanSettings:
    """Settings with ``rest_gib`` from a model, where ``total_gib`` is the budget and the rest is not given.

    Args:
        settings: What is asked; returned as they are for any other budget.
        model: In memory, whose dtype counts, or a checkpoint's folder, of which no weight is read.
        non_expert_bits: 8 or 4 if the quantize step will quantize the other linear layers too.

    Raises:
        AllocationError: The weights are sharded (FSDP1, DeepSpeed ZeRO-3), so that their sizes do not show.
        CheckpointError: The folder has no config that transformers knows.

    Example:
        >>> settings = with_rest(PlanSettings(total_gib=0.0002, group_size=64), model)
        >>> f"{settings.rest_gib:.2g} GiB beside the experts"
        '0.00021 GiB beside the experts'
    """
    if settings.total_gib is None or settings.rest_gib is not None:
        return settings
    if isinstance(model, nn.Module):
        whole = root_model(model)
    else:
        with opened(model) as checkpoint:
            whole = checkpoint.meta_model()
    sizes = ModelSizes(whole, settings.patterns, settings.group_size, non_expert_bits)
    if any(layer.router_is.gathers for layer in sizes.layers):
        raise AllocationError(
            f"total_gib={settings.total_gib:g}: this process holds a shard of the weights, which does not show what "
            "the whole model takes; give rest_gib, which `moe-precision estimate` prints, or expert_gib"
        )
    return replace(settings, rest_gib=sizes.rest_bytes / GIB)
