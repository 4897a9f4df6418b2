"""torchao's ``FqnToConfig`` in the form that transformers' ``TorchAoConfig`` reads: names or expressions to configs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ..plans.plan import PrecisionPlan
from .exported import Exported, ExportError, check_granularity
from .names import all_places, rules


def export(plan: PrecisionPlan) -> Exported:
    """For ``TorchAoConfig.from_dict``; whatever the plan does not name is left alone.

    Raises:
        ExportError: Fused experts at widths other than 8 and 16, or that differ within a layer.
    """
    notes = []
    config: dict[str, Any] = {}
    fused = {place.fused: place for place in all_places(plan) if place.fused}
    if fused:
        check_granularity(plan, "layer+projection", "torchao quantizes a fused matrix of all experts as one tensor")
        notes.append('fused experts run with from_pretrained(..., experts_implementation="eager") only')
        notes.append("fused experts at 8 bits have one scale per row: group_size has no effect there")
        for parameter, place in fused.items():
            bits = plan.layers[place.layer].projection_bits[place.projection][0]
            if bits not in (8, 16):
                raise ExportError(
                    f"torchao has only 8 bits for fused experts, {parameter!r} has {bits} in the plan; make one with "
                    "--bits 8 16, or export to another target"
                )
            if bits == 8:
                config[parameter] = _typed("Int8WeightOnlyConfig", 2, granularity=_typed("PerRow", 1, dim=-1))
    whole_layers = {place.layer for place in fused.values()}
    modules = replace(plan, layers={name: one for name, one in plan.layers.items() if name not in whole_layers})
    for rule in rules(modules):
        if rule.bits < 16:
            config[f"re:{rule.modules[0]}"] = _intx(rule.bits, plan.group_size)
    if modules.layers:
        notes.append(
            "torchao stores codes of fewer than 8 bits as int8: the values are those of the plan, the file is not"
        )
    default = _typed("FqnToConfig", 1, fqn_to_config=config)
    whole = {"quant_method": "torchao", "quant_type": {"default": default}}
    return Exported(whole, json.dumps(whole, indent=2) + "\n", plan, tuple(notes))


def _intx(bits: int, group_size: int) -> dict[str, Any]:
    """Asymmetric codes: symmetric ones have a single value at 1 bit."""
    return _typed(
        "IntxWeightOnlyConfig",
        2,
        weight_dtype={"_type": "torch.dtype", "_data": f"int{bits}"},
        granularity=_typed("PerGroup", 1, group_size=group_size),
        mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
    )


def _typed(kind: str, version: int, **data: Any) -> dict[str, Any]:
    """An object as torchao writes it to config.json."""
    return {"_type": kind, "_version": version, "_data": data}
