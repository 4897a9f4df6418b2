"""ModelOpt's ``quant_cfg``: fake quantization of every expert, fused or not, to evaluate a plan in its own pipeline."""

from __future__ import annotations

from typing import Any

import yaml

from ..plans.plan import PrecisionPlan
from .exported import Exported, with_widths
from .names import all_places


def export(plan: PrecisionPlan) -> Exported:
    """For ``mtq.quantize(model, config, forward_loop)``; whatever the plan does not name is left alone.

    Raises:
        ExportError: Experts that no known rule unfuses.
    """
    plan, notes = with_widths(plan, (2, 3, 4, 5, 6, 7, 8), "ModelOpt")
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    done = set()
    for place in all_places(plan):
        if place.fused in done:  # gate and up have one quantizer
            continue
        done.update({place.fused} - {""})
        widths = plan.layers[place.layer].projection_bits[place.projection]
        alike = len(set(widths)) == 1 and place.fused  # the only form for families with one quantizer for all experts
        for expert, bits in [(0, widths[0])] if alike else enumerate(widths):
            if place.fused:
                name = f"{place.fused}_weight_quantizer" + ("*" if alike else f"s.{expert}")
            else:
                name = f"{place.module_of(expert)}.weight_quantizer"
            if bits < 16:
                cfg = {"num_bits": bits, "block_sizes": {-1: plan.group_size}}
                entries.append({"quantizer_name": name, "cfg": cfg, "enable": True})
    config = {"quant_cfg": entries, "algorithm": "max"}
    notes.append(
        "ModelOpt simulates: weights go through the plan's widths in the forward pass, and the model stays as large"
    )
    return Exported(config, yaml.safe_dump(config, sort_keys=False), plan, tuple(notes))
