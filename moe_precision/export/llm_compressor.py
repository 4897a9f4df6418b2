"""llm-compressor's recipe, whose ``config_groups`` are those of compressed-tensors: one group per width."""

from __future__ import annotations

from typing import Any

import yaml

from ..plans.plan import PrecisionPlan
from .exported import Exported, for_engine
from .names import rules

_WIDTHS = (2, 3, 4, 5, 6, 7, 8)  # 1 bit would store zeros only; vLLM takes the same for the experts


def export(plan: PrecisionPlan, engine: str | None = None) -> Exported:
    """For ``oneshot(model, recipe=...)``; whatever the plan does not name is left alone.

    Weights are asymmetric, which costs less at few bits; for an engine they are symmetric, as its kernels want them.

    Raises:
        ExportError: An engine that cannot serve the plan, or experts that no known rule unfuses.
    """
    plan, notes = for_engine(plan, engine, "llm-compressor", _WIDTHS, "compressed-tensors", _WIDTHS)
    targets: dict[int, list[str]] = {}
    for rule in rules(plan):
        if rule.bits < 16:
            # an engine looks a module up under its name on the Hub too
            modules = rule.modules[:1] if engine is None else rule.modules
            targets.setdefault(rule.bits, []).extend(f"re:{pattern}" for pattern in modules)
    weights = {"type": "int", "symmetric": engine is not None, "strategy": "group", "group_size": plan.group_size}
    groups: dict[str, Any] = {
        f"experts_{bits}_bits": {"targets": targets[bits], "weights": {"num_bits": bits, **weights}}
        for bits in sorted(targets)
    }
    if engine is None or len(groups) > 1:
        why = "asymmetric" if engine is None else "of several widths"
        notes.append(
            f"from_pretrained of transformers 5.23 cannot load these experts, because they are {why}: load the "
            "checkpoint with an engine or with compressed-tensors. It loads one width for all experts, exported with "
            "--engine"
        )
    config = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"config_groups": groups}}}}
    return Exported(config, yaml.safe_dump(config, sort_keys=False), plan, tuple(notes))
