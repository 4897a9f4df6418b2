"""GPTQModel's ``dynamic``: expressions for module names; ``-:`` leaves modules alone and goes before ``+:``."""

from __future__ import annotations

import json
from typing import Any

from ..plans.plan import PrecisionPlan
from .exported import GPTQ_OF_ENGINES, Exported, for_engine, widths_of
from .names import all_but_experts, rules


def export(plan: PrecisionPlan, engine: str | None = None) -> Exported:
    """For ``GPTQConfig(dynamic=...)`` or ``RTNConfig(dynamic=...)``; whatever the plan does not name is left alone.

    Raises:
        ExportError: An engine that cannot serve the plan, or experts that no known rule unfuses.
    """
    plan, notes = for_engine(plan, engine, "GPTQModel", (2, 3, 4, 5, 6, 7, 8), "GPTQ", GPTQ_OF_ENGINES)
    odd = sorted(widths_of(plan) & {5, 6, 7})
    if odd:
        notes.append(
            f"matrices at {', '.join(map(str, odd))} bits make GPTQModel store the whole checkpoint as gptq_p, those "
            "at 2, 3, 4 and 8 bits too: other programs that read GPTQ refuse it or read other weights. Levels of 2, "
            "3, 4 and 8 keep the common form"
        )
    config: dict[str, dict[str, Any]] = {}
    for rule in rules(plan):
        # an engine matches the beginning of the name of a layer's experts, GPTQModel that of each module
        patterns = [f"^{layer}" for layer in rule.layers] if engine is not None else rule.modules[:1]
        for pattern in patterns:
            if rule.bits == 16:
                config[f"-:{pattern}"] = {}
            else:
                config[f"+:{pattern}"] = {"bits": rule.bits, "group_size": plan.group_size}
    config[f"-:{all_but_experts(plan)}"] = {}
    return Exported(config, json.dumps(config, indent=2) + "\n", plan, tuple(notes))
