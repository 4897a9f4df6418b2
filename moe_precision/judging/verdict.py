"""What a comparison's figures say, in plain words."""

from __future__ import annotations

import math

from .comparison import Comparison
from .statistics import p_among_draws

FEW_DOCUMENTS = 20


def verdict(comparison: Comparison) -> list[str]:
    """What the figures say in plain words, one line per budget and one on the ranking of experts."""
    lines = []
    for budget in comparison.budgets:
        parts = []
        paper, random = comparison.get("router_norm", budget), comparison.get("random", budget)
        if paper is not None and random is not None:
            rare = paper.bands["rare"].value
            on_mean, on_rare = (
                _against(value, draws) for value, draws in ((paper.mean.value, random.draws), (rare, random.rare_draws))
            )
            parts.append(
                f"the router-norm order {on_rare} on rare tokens and {on_mean} on the mean ({len(random.draws)} draws)"
            )
        best = comparison.winner(budget)
        if best is None:
            lines.append(f"At {budget:g} bits only controls were compared.")
            continue
        text = f"use `{best.name}` ({best.stored_bits:.3g} stored bits), which loses least here: {best.mean} nats"
        if paper is not None and best is not paper:
            gain, rare_gain = comparison.difference(best, paper), comparison.difference(best, paper, "rare")
            few = f", though {len(comparison.counts)} documents are few" * (len(comparison.counts) < FEW_DOCUMENTS)
            sure = few if gain.high < 0 else ", which is within the noise"
            text += f", {gain} against the router-norm order{sure}; on rare tokens {rare_gain}"
        text += f"; its KL to the float model is {best.divergence.kl:.5f}"
        if paper is not None and best is not paper:
            text += f", that of the router-norm order {paper.divergence.kl:.5f}"
        parts.append(text)
        lines.append(f"At {budget:g} bits on this model " + "; ".join(parts) + ".")
    if comparison.correlations:
        known = {signal: of["all"] for signal, of in comparison.correlations.items() if math.isfinite(of["all"])}
        listed = ", ".join(
            f"{signal} {known[signal]:.2f}" for signal in sorted(known, key=known.__getitem__, reverse=True)
        )
        lines.append(f"Rank correlation with the measured sensitivity over all experts: {listed}.")
    if len(comparison.counts) < FEW_DOCUMENTS:
        lines.append(f"Documents: {len(comparison.counts)}. Intervals are rough; judge on {FEW_DOCUMENTS} or more.")
    return lines


def _against(value: float, draws: list[float]) -> str:
    p = p_among_draws(value, draws)
    if p <= 0.05:
        return f"{'beats' if value < sum(draws) / len(draws) else 'loses to'} random order (p={p:.2g})"
    if p_among_draws(min(draws) - 1, draws) > 0.05:
        return f"cannot be distinguished from random order with {len(draws)} draws"
    return f"does not differ from random order (p={p:.2g})"
