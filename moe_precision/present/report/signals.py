"""What was recorded of each expert, under one name per signal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...judging.statistics import rank_correlation
from .run import Run


@dataclass(frozen=True)
class Signal:
    """One value per expert.

    Attributes:
        key: Short name.
        label: Name on an axis, with the unit.
        values: Layer name -> ``(E,)`` float64.
        logarithmic: Whether an axis shows it in powers of ten; then no value is below 0.
    """

    key: str
    label: str
    values: dict[str, Tensor]
    logarithmic: bool = False


def signals_of(run: Run) -> list[Signal]:
    """Every signal that the run has of all its layers, the change of norm first."""
    steps, norms = run.norms
    found = []
    if len(steps) >= 2:
        change = {name: (of[-1] - of[0]).double() for name, of in norms.items()}
        found.append(Signal("change", "change of router norm", change))
    if len(load := _loads(run)) == len(run.shapes):
        found.append(Signal("load", "load (even share = 1)", load))
    if run.curvature is not None:
        found.append(Signal("curvature", "curvature (mean g²)", _curvature(run), logarithmic=True))
    if run.tokens:
        tokens = {name: of.double() for name, of in run.tokens.items()}
        found.append(Signal("tokens", "tokens behind the statistics", tokens, logarithmic=True))
    if run.history is not None and len(run.history.max_variance) == len(run.shapes):
        variance = {name: of.double() for name, of in run.history.max_variance.items()}
        found.append(Signal("max_variance", "maximum variance of a neuron's weights", variance, logarithmic=True))
    return found


def correlation(one: Signal, other: Signal, layer: str) -> float | None:
    """Spearman's rank correlation over the experts of a layer; None where it is not defined."""
    found = rank_correlation(one.values[layer], other.values[layer])
    return found if found == found else None


def _loads(run: Run) -> dict[str, Tensor]:
    """Tokens of each expert in even shares: of training, else of validation; layers without tokens are left out."""
    recorded = {} if run.history is None else run.history.loads
    loads = recorded.get("training") or recorded.get("validation") or {}
    return {name: of[0] * of.shape[1] / of[0].sum() for name, of in loads.items() if of[0].sum() > 0}


def _curvature(run: Run) -> dict[str, Tensor]:
    """Mean squared gradient over all weights of each expert."""
    assert run.curvature is not None
    found = {}
    for name, shape in run.shapes.items():
        total = torch.zeros(shape.num_experts, dtype=torch.float64)
        for projection, (out, inp) in shape.projections.items():
            total += run.curvature.rows[name][projection].double().mean(dim=1) * out * inp
        found[name] = total / shape.expert_size
    return found
