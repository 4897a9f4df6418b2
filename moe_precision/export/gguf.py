"""llama.cpp's ``--tensor-type-file``: a GGUF type for each tensor of experts, one per layer and projection."""

from __future__ import annotations

import re

from ..plans.plan import PrecisionPlan
from .exported import Exported, check_granularity, rounded
from .names import all_places, gguf_tensor

# nominal bits, type, weights per block, bits that a weight takes with its share of the block's scales; ggml-common.h
_TYPES = (
    (1, "q1_0", 128, 1.125),
    (2, "q2_k", 256, 2.625),
    (3, "q3_k", 256, 3.4375),
    (4, "q4_k", 256, 4.5),
    (4, "q4_0", 32, 4.5),
    (5, "q5_k", 256, 5.5),
    (5, "q5_0", 32, 5.5),
    (6, "q6_k", 256, 6.5625),
    (8, "q8_0", 32, 8.5),
    (16, "bf16", 1, 16.0),
)


def gguf_type(bits: int, width: int) -> tuple[int, str, float]:
    """The smallest type with at least ``bits`` bits whose blocks divide a row.

    Args:
        bits: Nominal bits of the plan.
        width: Input width of the matrix, the length of a row.

    Returns:
        Its nominal bits, its name, and the bits that a weight takes in the file.
    """
    return next((b, name, stored) for b, name, block, stored in _TYPES if b >= bits and width % block == 0)


def export(plan: PrecisionPlan) -> Exported:
    """For ``llama-quantize --tensor-type-file FILE in.gguf out.gguf Q8_0``.

    Raises:
        ExportError: Experts of a layer differ, or llama.cpp does not have the model.
    """
    check_granularity(
        plan, "layer+projection", "GGUF keeps a matrix of all experts of a layer in one tensor of one type"
    )
    widths = {
        (name, projection): inp
        for name, layer in plan.layers.items()
        for projection, (_, inp) in layer.shape.projections.items()
    }
    plan, notes = rounded(plan, lambda bits, *of_what: gguf_type(bits, widths[of_what])[0], "GGUF")
    types = {}
    for place in all_places(plan):
        bits = plan.layers[place.layer].projection_bits[place.projection][0]
        types[gguf_tensor(place)] = gguf_type(bits, widths[place.layer, place.projection])[1]
    stored, weights = 0.0, 0
    for layer in plan.layers.values():
        for projection, (out, inp) in layer.shape.projections.items():
            size = out * inp * layer.shape.num_experts
            stored += gguf_type(layer.projection_bits[projection][0], inp)[2] * size
            weights += size
    notes.append(
        f"GGUF stores {stored / weights:.4g} bits per expert weight, in blocks of its own: group_size has no effect"
    )
    notes.append(
        "every other tensor gets llama-quantize's last argument; it ignores this list if that is F16, BF16 or F32"
    )
    if "q1_0" in types.values():
        notes.append("q1_0 needs a llama.cpp of 2026 or later")
    lines = [f"^{re.escape(tensor)}\\.weight$={name}\n" for tensor, name in types.items()]
    text = "".join(
        line.replace("ffn_gate_exps", "ffn_gate(_up)?_exps") for line in lines
    )  # some files have them joined
    return Exported(types, text, plan, tuple(notes))
