"""mlx-lm's ``quantization``: bits for the matrix of all experts of a layer."""

from __future__ import annotations

import json

from ..plans.plan import PrecisionPlan
from .exported import Exported, ExportError, check_granularity, with_widths
from .names import all_places, mlx_module

_GROUP_SIZES = (32, 64, 128)


def export(plan: PrecisionPlan) -> Exported:
    """For ``mlx_lm.convert(quant_predicate=...)`` and config.json's ``quantization``; paths are of mlx-lm's modules.

    Raises:
        ExportError: Experts of a layer differ, MLX does not have the group size, or there is no gate, up and down.
    """
    parts = {place.part for place in all_places(plan)}
    if parts != {"gate_proj", "up_proj", "down_proj"}:
        raise ExportError(f"mlx-lm's experts have gate, up and down matrices, the plan's have {sorted(parts)}")
    check_granularity(plan, "layer+projection", "MLX keeps a matrix of all experts of a layer in one tensor")
    if plan.group_size not in _GROUP_SIZES:
        raise ExportError(
            f"MLX has groups of {_GROUP_SIZES}, the plan has {plan.group_size}; make it with --group-size 64"
        )
    plan, notes = with_widths(plan, (1, 2, 3, 4, 5, 6, 8), "MLX")
    settings = {"group_size": plan.group_size, "mode": "affine"}
    config: dict[str, object] = {}
    for place in all_places(plan):
        bits = plan.layers[place.layer].projection_bits[place.projection][0]
        config[mlx_module(place, plan.model_type)] = False if bits == 16 else {"bits": bits, **settings}
    widest = max((of_one["bits"] for of_one in config.values() if isinstance(of_one, dict)), default=8)
    notes.append("every other layer: give mlx_lm.convert a predicate that returns False, or its own bits, for it")
    config = {"bits": widest, **settings, **config}
    return Exported(config, json.dumps(config, indent=2) + "\n", plan, tuple(notes))
