"""Flat keys for loggers beside those of the history: whether the plan has settled."""

from __future__ import annotations

from ..allocation.orders import bits_from_orders, rank_experts
from ..plans.settings import PlanSettings
from ..recording.history import RouterNormHistory


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
