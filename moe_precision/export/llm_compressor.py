"""llm-compressor's recipe, whose ``config_groups`` are those of compressed-tensors: one group per width."""

from __future__ import annotations

from typing import Any

import yaml

from ..plans.plan import PrecisionPlan
from .exported import Exported, for_engine
from .names import rules

_OF_AN_ENGINE = (2, 3, 4, 5, 6, 7, 8)  # what vLLM accepts for the experts of a compressed-tensors checkpoint


def export(plan: PrecisionPlan, engine: str | None = None) -> Exported:
    """For ``oneshot(model, recipe=...)``; whatever the plan does not name is left alone.

    Weights are asymmetric, which costs less at few bits; for an engine they are symmetric, as its kernels want them.

    Raises:
        ExportError: An engine that cannot serve the plan, or experts that no known rule unfuses.
    """
    have = (1, 2, 3, 4, 5, 6, 7, 8)
    plan, notes = for_engine(plan, engine, "llm-compressor", have, "compressed-tensors", _OF_AN_ENGINE)
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
    config = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"config_groups": groups}}}}
    return Exported(config, yaml.safe_dump(config, sort_keys=False), plan, tuple(notes))
