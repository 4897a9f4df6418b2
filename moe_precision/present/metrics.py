"""Flat keys for loggers beside the router norms: how tokens are spread, and whether the plan has settled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..allocation.orders import bits_from_orders, rank_experts
from ..plans.settings import PlanSettings
from ..recording.history import RouterNormHistory, aggregates


def load_metrics(before: dict[str, Tensor], now: dict[str, Tensor], layers: Sequence[str]) -> dict[str, float]:
    """Tokens of the least, the median and the most loaded expert of each layer, in even shares.

    Args:
        before: Layer name -> ``(2, E)``, tokens and routing weight up to the last time that this was logged.
        now: Layer name -> ``(2, E)``, the totals now.
        layers: Names of all layers, in module order.

    Returns:
        ``expert_load/layer_03/{min,median,max}``; 1 is an equal share of the tokens. Layers without
        new tokens are left out.
    """
    metrics: dict[str, float] = {}
    for index, name in enumerate(layers):
        if name not in now:
            continue
        tokens = now[name][0] - before[name][0] if name in before else now[name][0]
        if tokens.sum() > 0:
            metrics |= aggregates(f"expert_load/layer_{index:02d}", (tokens * len(tokens) / tokens.sum()).tolist())
    return metrics


def plan_metrics(history: RouterNormHistory, settings: PlanSettings) -> dict[str, float]:
    """``plan/changed``: the share of experts whose bits the last record changed, 0 once the plan has settled.

    By the paper's rule without variances, which are measured at the end. Empty for other methods, before the third
    record, and where a norm is not finite.
    """
    if settings.method != "router_norm" or len(history.steps) < 3 or history.not_finite(last_only=True):
        return {}

    def bits_at(record: int) -> list[int]:
        orders = {name: rank_experts(change) for name, change in history.changes(record).items()}
        return [bits for widths in bits_from_orders(orders, history.layers, settings).values() for bits in widths]

    before, now = bits_at(-2), bits_at(-1)
    return {"plan/changed": sum(a != b for a, b in zip(before, now, strict=True)) / len(now)}
