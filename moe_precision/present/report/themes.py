"""Colors of the two themes, as templates for plotly's layout, and a color for every width.

More bits have more contrast with the ground: darker on white, brighter on black. The colors are viridis, whose
lightness rises steadily, so that color-blind readers can tell them apart; charts add a symbol for each width.
"""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

_LINES = {"light": ["#0b5cad", "#c25400", "#5f6b76"], "dark": ["#6cb6ff", "#ffa657", "#9aa4af"]}  # blue, orange, gray
_INK = {"light": ("#1b1f24", "#d0d7de", "#ffffff"), "dark": ("#e6edf3", "#30363d", "#161b22")}  # text, grid, hover
_RANGE = {"light": (0.55, 0.0), "dark": (0.32, 1.0)}  # of viridis, from the fewest bits to the most


def themes(groups: int, levels: int) -> dict[str, Any]:
    """What the page needs of each theme.

    Args:
        groups: Number of groups that experts are colored by.
        levels: Number of widths in the heatmap.

    Returns:
        ``light`` and ``dark``, each with ``template`` for plotly's layout, ``widths`` (a color for each group),
        ``levels`` (a color scale in steps) and ``number`` (the color of numbers on it).
    """
    found = {}
    for name, (text, grid, hover) in _INK.items():
        axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "ticks": "", "automargin": True}
        colors = _colors(name, levels)
        layout = {
            "autotypenumbers": "strict",
            "colorway": _LINES[name],
            "paper_bgcolor": "rgba(0,0,0,0)",  # the page's own ground
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": text, "family": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"},
            "hoverlabel": {"align": "left", "bgcolor": hover, "bordercolor": grid, "font": {"color": text}},
            "xaxis": axis,
            "yaxis": axis,
        }
        found[name] = {
            "template": {"layout": layout},
            "widths": _colors(name, groups),
            "number": "#ffffff" if name == "light" else None,  # on a cell; None for plotly's choice
            "levels": [[edge / levels, color] for at, color in enumerate(colors) for edge in (at, at + 1)],
        }
    return found


def _colors(theme: str, count: int) -> list[str]:
    first, last = _RANGE[theme]
    places = [first + (last - first) * at / (count - 1) for at in range(count)] if count > 1 else [(first + last) / 2]
    return [to_hex(colormaps["viridis"](place)) for place in places]
