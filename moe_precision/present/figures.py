"""Pictures: the router-norm curves of a run, the change as a heatmap, and a comparison of methods."""

from __future__ import annotations

import math

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..judging.comparison import Comparison
from ..plans.methods import CONTROLS
from ..plans.plan import PrecisionPlan
from ..recording.history import RouterNormHistory

_MAX_COLUMNS = 4


def plot_router_norms(history: RouterNormHistory, plan: PrecisionPlan | None = None) -> Figure:
    """One panel per layer, one curve per expert; with a plan, curves are colored by the expert's bits.

    An expert whose matrices have different widths counts with their mean.
    """
    columns = min(_MAX_COLUMNS, len(history.layers))
    rows = math.ceil(len(history.layers) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    of_layers = {} if plan is None else {name: layer.mean_bits for name, layer in plan.layers.items()}
    widths = sorted({bits for of_layer in of_layers.values() for bits in of_layer})
    for axis, (name, norms) in zip(axes, history.norms.items(), strict=False):
        for expert in range(norms.shape[1]):
            color, label = None, None
            if plan is not None:
                bits = of_layers[name][expert]
                color = colormaps["viridis_r"](0.1 + 0.9 * widths.index(bits) / max(1, len(widths) - 1))
                label = f"{bits:.3g} bits" if of_layers[name].index(bits) == expert else None
            axis.plot(history.steps, norms[:, expert], lw=1.2, color=color, label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("router L2 norm")
        if plan is not None:
            curves, labels = axis.get_legend_handles_labels()
            by_bits = sorted(zip(labels, curves, strict=True), key=lambda pair: float(pair[0].split()[0]))
            axis.legend([curve for _, curve in by_bits], [label for label, _ in by_bits], fontsize=7)
    for axis in axes[len(history.layers) :]:
        axis.remove()
    return figure


def plot_change_heatmap(history: RouterNormHistory) -> Figure:
    """Change of router norm since the baseline, one row per layer and one column per expert."""
    changes = [history.change(name) for name in history.layers]
    width = max(len(change) for change in changes)
    grid = torch.full((len(changes), width), math.nan)
    for row, change in enumerate(changes):
        grid[row, : len(change)] = change
    figure = Figure(figsize=(1.5 + min(12, 0.35 * width), 1.2 + min(10, 0.35 * len(changes))), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("expert")
    axis.set_ylabel("MoE layer")
    figure.colorbar(image, ax=axis, label="change of router L2 norm")
    return figure


def plot_comparison(comparison: Comparison) -> Figure:
    """One panel per budget, and one beside it for the rarest tokens: every method with its interval, best on top."""
    budgets = comparison.budgets
    most = max((len(comparison.at(budget)) for budget in budgets), default=1)
    figure = Figure(figsize=(11, max(2.5, 0.32 * most + 1.2) * max(1, len(budgets))), layout="constrained")
    axes = figure.subplots(max(1, len(budgets)), 2, squeeze=False, sharey="row")
    for panels, budget in zip(axes, budgets, strict=False):
        rows = comparison.at(budget)
        for axis, title in zip(panels, ("all tokens", "rarest tenth of the tokens"), strict=True):
            for place, row in enumerate(rows):
                interval = row.mean if title == "all tokens" else row.bands["rare"]
                control = row.method in CONTROLS
                low, high = max(0.0, interval.value - interval.low), max(0.0, interval.high - interval.value)
                axis.errorbar(interval.value, place, xerr=[[low], [high]], fmt="o", color="0.6" if control else "C0")
            axis.axvline(0, color="0.8", lw=0.8)
            axis.set_xlabel("increase of the loss, nats per token")
            axis.set_title(f"{budget:g} bits, {title}", fontsize=9)
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        panels[0].invert_yaxis()
    return figure
