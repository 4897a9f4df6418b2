"""DynQuant's bit map: a width for every module, and one for each parameter that holds all experts of a layer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ..plans.plan import PrecisionPlan
from .exported import Exported, ExportError, check_granularity, with_widths
from .names import all_places

_WIDTHS = (2, 3, 4, 8)
_GROUPS = 32  # a multiple of it, so that each starts in a word of its own at every width


def export(plan: PrecisionPlan) -> Exported:
    """For ``dynquant export CHECKPOINT --map FILE``; whatever the map does not name stays as it is.

    Its names are those of the modules and parameters of the model in memory, not of the files. Experts that are modules
    may differ in width, slices of one parameter may not.

    Raises:
        ExportError: Fused experts of a layer differ, or groups that are no multiple of 32.
    """
    names = {place: place.fused for place in all_places(plan)}
    fused = {place.layer for place, name in names.items() if name}
    check_granularity(
        replace(plan, layers={name: layer for name, layer in plan.layers.items() if name in fused}),
        "layer+projection",
        "DynQuant has one width for the parameter that holds a matrix of all experts of a layer",
    )
    if plan.group_size % _GROUPS:
        raise ExportError(
            f"DynQuant has groups of a multiple of {_GROUPS}, the plan has {plan.group_size}; make it with "
            f"--group-size {_GROUPS}"
        )
    plan, notes = with_widths(plan, _WIDTHS, "DynQuant")
    bits: dict[str, int] = {}
    for place, name in names.items():
        for expert, width in enumerate(plan.layers[place.layer].projection_bits[place.projection]):
            if width < 16:
                bits[name or place.module_of(expert)] = width
    config: dict[str, Any] = {
        "schema": "dynquant_allocation_v1",
        "allocator": f"moe-precision, {plan.method}",
        "group_size": plan.group_size,
        "maps": {f"{plan.average_bits:.2f}": {"group_size": plan.group_size, "bits": bits}},
    }
    notes += [
        f"dynquant refuses the map without --group-size {plan.group_size}",
        "what it writes loads after dynquant.register_hf_quantizer() alone: without that, transformers gives random "
        "weights and only logs a warning",
    ]
    return Exported(config, json.dumps(config, indent=2) + "\n", plan, tuple(notes))
