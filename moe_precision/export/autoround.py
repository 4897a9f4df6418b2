"""AutoRound's ``layer_config``: a width for every matrix of every expert."""

from __future__ import annotations

import json

from ..plans.plan import PrecisionPlan
from .exported import GPTQ_OF_ENGINES, Exported, for_engine
from .names import all_places


def export(plan: PrecisionPlan, engine: str | None = None) -> Exported:
    """For ``AutoRound(model, tokenizer, layer_config=...)``; names are those after AutoRound has unfused the experts.

    Raises:
        ExportError: An engine that cannot serve the plan, or experts that no known rule unfuses.
    """
    plan, notes = for_engine(plan, engine, "AutoRound", (2, 3, 4, 5, 6, 7, 8), "GPTQ", GPTQ_OF_ENGINES)
    config = {}
    for place in all_places(plan):
        for expert, bits in enumerate(plan.layers[place.layer].projection_bits[place.projection]):
            of_one = {"bits": 16} if bits == 16 else {"bits": bits, "group_size": plan.group_size}
            config[place.module_of(expert)] = of_one
    notes.append(
        "every other linear layer gets AutoRound's own bits; a base of 16 writes what from_pretrained refuses, so name "
        'layers to leave alone here, with {"bits": 16}'
    )
    text = ",\n".join(f"  {json.dumps(name)}: {json.dumps(of_one)}" for name, of_one in config.items())
    return Exported(config, f"{{\n{text}\n}}\n", plan, tuple(notes))
