"""Maps of a width for every expert, for the forks and tools that serve experts of one layer at different widths.

`fq-policy/2` (progressive-tensors, schemas/fq-policy-2.schema.json) and `hybrid_bit_map` (the config key of
local-inference-lab's vLLM) list the experts of a decoder layer by index, under the layer's number. ExLlamaV3's recipe
(``convert.py --recipe``) names every matrix.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from ..plans.plan import PrecisionPlan
from .exported import Exported, ExportError, widths_of, with_widths
from .names import all_places, block

_TIERS = (3, 4)  # NF3, and the kept one: NVFP4 or MXFP4
_TRELLIS = (1, 2, 3, 4, 5, 6, 7, 8)  # ExLlamaV3's


def fq_policy(plan: PrecisionPlan) -> Exported:
    """For ``fq_fetch --recipe`` and ``fq_assemble --policy``: one K for every expert of every layer.

    Raises:
        ExportError: Projections of an expert differ, a width is 16, or layers have no number of their own.
    """
    plan, notes = with_widths(plan, _TRELLIS, "fq-policy/2")
    if 16 in widths_of(plan):
        raise ExportError("fq-policy/2 has a trellis of 1 to 8 bits for every expert, and the plan leaves some at 16")
    config = {
        "schema": "fq-policy/2",
        "bits_per_expert": _by_number(plan, "fq-policy/2"),
        "budget": {"mode": "manual"},
        "notes": f"method {plan.method}, {plan.average_bits:.4g} bits on average",
    }
    if widths_of(plan) - set(_TIERS):
        notes.append("the vLLM fork that changes such policies while it serves takes 3 and 4 bits alone")
    notes.append("the segments that it is assembled from must hold every expert at its width")
    return Exported(config, json.dumps(config, indent=2) + "\n", plan, tuple(notes))


def hybrid_bit_map(plan: PrecisionPlan) -> Exported:
    """For the ``quantization_config`` of a checkpoint with two tiers of experts, NVFP4 or MXFP4 and NF3.

    Raises:
        ExportError: Projections of an expert differ, a width is above 4, or layers have no number of their own.
    """
    plan, notes = with_widths(plan, _TIERS, "hybrid_bit_map")
    if over := sorted(widths_of(plan) - set(_TIERS)):
        raise ExportError(
            f"hybrid_bit_map has tiers of 3 and 4 bits, and the plan has experts above them ({over[-1]} bits once "
            "rounded): make it with --bits 3 4"
        )
    config = {"hybrid_bit_map": _by_number(plan, "hybrid_bit_map")}
    notes.append(
        "put the key into quantization_config of a checkpoint whose experts its packer has written in these tiers; "
        "kept_format says whether those at 4 bits are MXFP4"
    )
    return Exported(config, json.dumps(config, indent=2) + "\n", plan, tuple(notes))


def exl3(plan: PrecisionPlan) -> Exported:
    """For ExLlamaV3's ``convert.py --recipe``: a bitrate for every matrix; whatever the plan does not name stays.

    Raises:
        ExportError: The Hub has no matrix for each expert.
    """
    plan, notes = with_widths(plan, _TRELLIS, "ExLlamaV3")
    tensors: dict[str, int] = {"*": 16}  # the last entry that matches a key counts
    mixed = False
    for place in all_places(plan):
        if "{expert}" not in place.hub:
            raise ExportError(
                f"the Hub holds all experts of layer {place.layer!r} in one tensor ({place.hub}), and a recipe names "
                "a matrix for each"
            )
        widths = plan.layers[place.layer].projection_bits[place.projection]
        mixed = mixed or len(set(widths)) > 1
        tensors |= {place.hub.replace("{expert}", str(expert)): bits for expert, bits in enumerate(widths)}
    config: dict[str, Any] = {"target_bpw": round(plan.average_bits, 4), "tensors": tensors}
    if mixed:
        notes.append(
            "ExLlamaV3 1.6.5 itself runs the experts of a layer's projection at one bitrate; others need a fork with a "
            "table of bitrates, or a plan with --granularity layer+projection"
        )
    return Exported(config, yaml.safe_dump(config, sort_keys=False), plan, tuple(notes))


def _by_number(plan: PrecisionPlan, target: str) -> dict[str, list[int]]:
    """Number of a decoder layer -> bits of its experts.

    Raises:
        ExportError: Projections of an expert differ, or a layer is not a decoder's own.
    """
    found: dict[str, list[int]] = {}
    for name, layer in plan.layers.items():
        number = str(block(name))
        if number in found:
            raise ExportError(
                f"{target} lists experts by their decoder layer, and two layers of the plan have {number}"
            )
        first, *others = layer.projection_bits.values()
        if any(other != first for other in others):
            raise ExportError(
                f"{target} has one width for an expert, and the projections of experts in {name!r} differ: make the "
                "plan with --granularity expert, or replan it so"
            )
        found[number] = list(first)
    return found
