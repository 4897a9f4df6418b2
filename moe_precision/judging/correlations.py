"""How well each signal ranks the experts by what quantizing them costs, as it was measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocation.costs import Costs
from ..allocation.snapshot import Snapshot
from .statistics import rank_correlation


def correlations(final: Snapshot, baseline: Snapshot | None, costs: dict[str, Costs]) -> dict[str, dict[str, float]]:
    """Spearman's correlation of every signal with the measured sensitivity at the lowest level.

    Args:
        final: The trained model.
        baseline: The start of training, or None; its loads are used where ``final`` has none.
        costs: By method; ``sensitivity`` is the reference.

    Returns:
        Signal -> ``all`` experts or a layer -> correlation, positive where the signal gives more bits to experts that
        need them.
    """

    def at_lowest(method: str) -> dict[str, Tensor]:
        return {name: sum(of[:, 0] for of in found.values()) for name, found in costs[method].items()}  # type: ignore[misc]

    signals: dict[str, dict[str, Tensor]] = {}
    if baseline is not None:
        first = baseline.router_norms
        signals["router_norm_change"] = {name: first[name] - norm for name, norm in final.router_norms.items()}
    signals["final_router_norm"] = {name: -norm for name, norm in final.router_norms.items()}
    signals["max_variance"] = dict(final.max_variance)
    loads = final.loads if baseline is None else baseline.loads or final.loads
    if len(loads) == len(final.layers):
        signals["expert_load"] = {name: load[0] for name, load in loads.items()}
        if not any(load[1].isnan().any() for load in loads.values()):
            signals["routing_weight"] = {name: load[1] for name, load in loads.items()}
    signals |= {method: at_lowest(method) for method in ("weight_error", "curvature", "statistics") if method in costs}
    reference = at_lowest("sensitivity")
    found = {}
    for signal, by_layer in signals.items():
        together = [torch.cat([of[name].double() for name in reference]) for of in (by_layer, reference)]
        found[signal] = {"all": rank_correlation(*together)}
        found[signal] |= {name: rank_correlation(by_layer[name], reference[name]) for name in reference}
    return found
