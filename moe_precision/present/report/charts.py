"""Charts as plotly figures: plain dictionaries in plotly's own JSON, without colors, which follow the page's theme.

A trace of experts names its place among the widths in ``meta.width``; the page gives it that width's color.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from torch import Tensor

from ...plans.plan import PrecisionPlan
from ..settling import Settling
from ..thinning import evenly_thinned
from .groups import Widths
from .run import Run
from .signals import Signal, correlation

Figure = dict[str, Any]  # ``data`` and ``layout``

MAX_VALUES = 250_000  # of all curves together, which keeps the page of a large model below 5 MB
_MAX_POINTS = 500  # of one curve
_NUMBERED_CELLS = 16  # experts of a layer up to which a heatmap's cells show their bits
_LINEAR_SPREAD = 30.0  # the largest value over the least, up to which an axis is linear
_FEW_CURVES = 32  # of a layer, up to which more than the ends of each have symbols
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "hexagon")
_MOUSE = "<extra></extra>"  # nothing beside the text that is given


def kept_steps(run: Run) -> list[int]:
    """Indices of the records whose norms are drawn."""
    steps, _ = run.norms
    experts = sum(shape.num_experts for shape in run.shapes.values())
    return evenly_thinned(len(steps), max(2, min(_MAX_POINTS, MAX_VALUES // experts)))


def curves(steps: list[int], norms: Tensor, layer: str, widths: Widths) -> Figure:
    """Router norms of one layer, a curve for each expert.

    Args:
        steps: Optimizer steps that are drawn.
        norms: ``(steps, E)``.
        layer: The layer's name.
        widths: The groups of experts.
    """
    shown: set[int] = set()
    few = norms.shape[1] <= _FEW_CURVES
    traces = []
    for expert in range(norms.shape[1]):
        group = widths.group(layer, expert)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": steps,
                "y": digits(norms[:, expert]),
                "name": widths.label(group),
                "legendgroup": str(group),
                "legendrank": group + 1,
                "showlegend": group not in shown,
                "line": {"width": 1.5 if few else 1},
                "marker": {"symbol": SYMBOLS[group % len(SYMBOLS)], "size": 7, "maxdisplayed": 6 if few else 2},
                "meta": {"width": group, "expert": expert},
                "hovertemplate": f"expert {expert}{widths.of_expert(layer, expert)}<br>step %{{x}}: %{{y:.5g}}{_MOUSE}",
            }
        )
        shown.add(group)
    layout = _layout(440, "optimizer step", "router L2 norm")
    layout["showlegend"] = len(shown) > 1
    return {"data": traces, "layout": layout}


def pairs(signals: list[Signal], layer: str, widths: Widths) -> list[Figure]:
    """Change of norm, load and curvature of a layer's experts against each other, a point for each expert."""
    drawn = [signal for signal in signals if signal.key in ("change", "load", "curvature")]
    found = []
    for one, other in combinations(drawn, 2):
        x, y = digits(one.values[layer], 5), digits(other.values[layer], 5)
        by_group: dict[int, list[int]] = {}
        for expert in range(len(x)):
            by_group.setdefault(widths.group(layer, expert), []).append(expert)
        traces = [
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x[expert] for expert in experts],
                "y": [y[expert] for expert in experts],
                "name": widths.label(group),
                "marker": {"symbol": SYMBOLS[group % len(SYMBOLS)], "size": 9},
                "meta": {"width": group},
                "text": [f"expert {expert}{widths.of_expert(layer, expert)}" for expert in experts],
                "customdata": experts,
                "hovertemplate": f"%{{text}}<br>{one.key} %{{x:.4g}}<br>{other.key} %{{y:.4g}}{_MOUSE}",
            }
            for group, experts in sorted(by_group.items())
        ]
        rank = correlation(one, other, layer)
        layout = _layout(330, one.label, other.label)
        layout["title"] = {
            "text": "" if rank is None else f"rank correlation {rank:+.2f}",
            "font": {"size": 13},
            "x": 0.5,
            "xref": "paper",
        }
        for axis, signal in (("xaxis", one), ("yaxis", other)):
            layout[axis]["exponentformat"] = "power"
            if signal.logarithmic and _spread(signal.values[layer]) > _LINEAR_SPREAD:
                layout[axis] |= {"type": "log", "dtick": 1}
        found.append({"data": traces, "layout": layout})
    return found


def bits_heatmaps(plan: PrecisionPlan) -> list[tuple[str, Figure]]:
    """Bits of every expert, a row for each layer: one chart, or one for each matrix where these differ."""
    projections = {name: None for layer in plan.layers.values() for name in layer.projection_bits}
    banks = [list(layer.projection_bits.values()) for layer in plan.layers.values()]
    levels = bit_levels(plan)
    if all(widths == bank[0] for bank in banks for widths in bank):
        return [("", _heatmap([bank[0] for bank in banks], levels))]
    found = []
    for name in projections:
        rows = [layer.projection_bits.get(name, []) for layer in plan.layers.values()]
        found.append((name, _heatmap(rows, levels)))
    return found


def bit_levels(plan: PrecisionPlan) -> list[int]:
    """All widths of a plan, ascending."""
    return sorted({bits for layer in plan.layers.values() for of in layer.projection_bits.values() for bits in of})


def _heatmap(rows: list[list[int]], levels: list[int]) -> Figure:
    """Widths by their place among the levels, so that all steps of the color bar are as large."""
    trace: Figure = {
        "type": "heatmap",
        "z": [[levels.index(bits) for bits in row] for row in rows],
        "text": rows,
        "zmin": -0.5,
        "zmax": len(levels) - 0.5,
        "xgap": 1 if max(map(len, rows)) <= 64 else 0,
        "ygap": 1 if len(rows) <= 64 else 0,
        "meta": {"levels": True},
        "hovertemplate": f"layer %{{y}}, expert %{{x}}: %{{text}} bits{_MOUSE}",
        "colorbar": {
            "title": {"text": "bits"},
            "tickvals": list(range(len(levels))),
            "ticktext": list(map(str, levels)),
            "thickness": 14,
            "outlinewidth": 0,
            "len": 1,
        },
    }
    if max(map(len, rows)) <= _NUMBERED_CELLS:
        trace["texttemplate"] = "%{text}"
    layout = _layout(min(900, max(220, 120 + 22 * len(rows))), "expert", "MoE layer")
    layout["margin"]["t"] = 12
    layout["xaxis"] |= {"showgrid": False, "zeroline": False, "tickformat": "d"} | _whole(max(map(len, rows)))
    layout["yaxis"] |= {"showgrid": False, "zeroline": False, "autorange": "reversed"} | _whole(len(rows))
    return {"data": [trace], "layout": layout}


def settling_chart(found: Settling) -> Figure:
    """Share of experts with other bits than at the end, and than at the record before."""
    lines = (
        ("than at the end", found.to_last, "solid", "circle"),
        ("than at the record before", found.to_previous, "dot", "square"),
    )
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(found.steps) <= 60 else "lines",
            "x": found.steps,
            "y": [None if share is None else round(share, 4) for share in shares],
            "name": name,
            "line": {"dash": dash, "width": 2},
            "marker": {"symbol": symbol, "size": 6},
            "hovertemplate": f"step %{{x}}: %{{y:.1%}} have other bits {name}{_MOUSE}",
        }
        for name, shares, dash, symbol in lines
    ]
    layout = _layout(340, "optimizer step", "experts with other bits")
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def tokens_chart(tokens: dict[str, Tensor]) -> Figure:
    """Tokens of the expert with the least, of the median one and of the one with the most, by layer."""
    by_name = {
        "least": ([int(of.min()) for of in tokens.values()], "triangle-down"),
        "median": ([int(of.median()) for of in tokens.values()], "circle"),
        "most": ([int(of.max()) for of in tokens.values()], "triangle-up"),
    }
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(range(len(tokens))),
            "y": values,
            "name": name,
            "line": {"width": 1, "dash": "solid" if name == "median" else "dot"},
            "marker": {"symbol": symbol, "size": 9},
            "hovertemplate": f"layer %{{x}}, {name}: %{{y:,}} tokens{_MOUSE}",
        }
        for name, (values, symbol) in by_name.items()
    ]
    layout = _layout(340, "MoE layer", "tokens of an expert")
    layout["xaxis"] |= _whole(len(tokens))
    layout["yaxis"] |= {"rangemode": "tozero", "tickformat": ",d"}
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def comparison_charts(comparison: dict[str, Any], controls: set[str]) -> list[tuple[str, Figure]]:
    """For each budget the increase of the loss by method, with intervals; the best on top.

    Args:
        comparison: As `Comparison.to_dict` gives it.
        controls: Names of methods that are yardsticks.
    """
    budgets = sorted({row["asked_bits"] for row in comparison["rows"] if row["asked_bits"] is not None})
    found = []
    for budget in budgets:
        rows = [row for row in comparison["rows"] if row["asked_bits"] == budget]
        rows.sort(key=lambda row: row["increase"]["value"] or 0.0)
        values = [row["increase"]["value"] for row in rows]
        limits = {
            "array": [(row["increase"]["high"] or value) - value for row, value in zip(rows, values, strict=True)],
            "arrayminus": [value - (row["increase"]["low"] or value) for row, value in zip(rows, values, strict=True)],
        }
        trace = {
            "type": "scatter",
            "mode": "markers",
            "x": values,
            "y": [row_name(row) for row in rows],
            "error_x": {"type": "data", "symmetric": False, "thickness": 1.5, **limits},
            "marker": {"size": 9, "symbol": ["circle-open" if r["method"] in controls else "circle" for r in rows]},
            "hovertemplate": f"%{{y}}: %{{x:.4f}}{_MOUSE}",
        }
        layout = _layout(110 + 26 * len(rows), "increase of the loss, nats per token", "")
        layout["margin"]["t"] = 12
        layout["xaxis"]["exponentformat"] = "none"  # not 200µ
        layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
        found.append((f"{budget:g} bits", {"data": [trace], "layout": layout}))
    return found


def row_name(row: dict[str, Any]) -> str:
    """Method, with its granularity where it is not the usual one."""
    if row["method"] == "uniform":
        return f"uniform {row['average_bits']:g} bits"
    return str(row["method"]) + ("" if row["granularity"] == "expert" else f", {row['granularity']}")


def digits(values: Tensor, number: int = 7) -> list[float | None]:
    """The leading digits of each value, by default all that a float32 holds; None for what JSON does not have."""
    return [float(f"{value:.{number}g}") if math.isfinite(value) else None for value in values.tolist()]


def _layout(height: int, x: str, y: str) -> Figure:
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 56, "r": 16, "t": 40, "b": 52},
        "hovermode": "closest",
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
    }


def _whole(count: int) -> Figure:
    """Ticks of an axis that counts: whole numbers."""
    return {"tickmode": "linear", "tick0": 0, "dtick": max(1, -(-count // 16))}


def _spread(values: Tensor) -> float:
    """How many times the least value the largest is; 0 where a logarithm cannot show it."""
    return float(values.max() / values.min()) if bool((values > 0).all()) else 0.0
