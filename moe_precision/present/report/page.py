"""The page: figures and texts of a run in one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import gzip
import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from ...files import replaced_when_done
from ...plans.methods import CONTROLS
from ...version import __version__
from ..settling import Settling, norm_settings, settling
from . import charts, texts
from .groups import Widths
from .run import ReportError, Run, read_run
from .signals import Signal, correlation, signals_of
from .themes import themes

INSTALL = "the report's charts need plotly: pip install 'moe-precision[report]'"


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of a run.

    Args:
        run: The run's folder, its plan (``x.json``) or its history (``x.history.safetensors``).
        output: The file to write; by default ``report.html`` beside the plan. An existing one is replaced.

    Returns:
        The file.

    Raises:
        ReportError: plotly is not installed; or several runs or two models are in the folder.
        FileNotFoundError: There is neither a plan nor a history.
        PlanError: The plan is damaged.
        HistoryError: The history is damaged.

    Example:
        >>> from moe_precision.present.report.page import write_report
        >>> write_report("precision_plan.json", "report.html").name
        'report.html'
    """
    check_installed()
    found = read_run(run)
    path = found.files.plan.parent / "report.html" if output is None else Path(output)
    text = page(found)
    with replaced_when_done(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def check_installed() -> None:
    """Raises `ReportError` with what to install if plotly or jinja2 is missing."""
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise ReportError(INSTALL) from error


def page(run: Run) -> str:
    """The whole page of a run, as HTML."""
    from jinja2 import Environment, StrictUndefined

    widths, signals = Widths(run.plan), signals_of(run)
    settled = None if run.history is None else settling(run.history, norm_settings(run.plan))
    figures = payload(run, signals, widths, settled)
    sources = {kind: files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    first = next(iter(run.shapes))
    heatmaps = [] if run.plan is None else [name for name, _ in charts.bits_heatmaps(run.plan)]
    names = {
        "title": f"{run.model_type or 'Model'}: report of a run",
        "subtitle": texts.subtitle(run),
        "style": sources["css"],
        "script": sources["js"],
        "library": _library(),
        "figures": _packed(json.dumps(figures, allow_nan=False, separators=(",", ":"))),
        "facts": texts.facts(run, settled),
        "commands": texts.commands(run),
        "layers": list(run.shapes),
        "curves_text": texts.curves(run, len(charts.kept_steps(run))),
        "has_curves": bool(run.norms[0]),
        "pairs": [texts.of_axes(one) for one in charts.pairs(signals, first, widths)],
        "pairs_text": texts.pairs(signals),
        "correlations": _correlations(run, signals),
        "columns": texts.columns(run, signals),
        "bits": heatmaps,
        "bits_text": texts.bits(run),
        "settling_text": texts.settling(run, settled),
        "has_settling": settled is not None,
        "tokens_text": texts.tokens(run),
        "tables": texts.tables(run),
        "settings": texts.settings(run),
        "read": [path.name for path in run.read],
        "absent": run.absent,
        "version": __version__,
    }
    names["sections"] = texts.sections(names)
    return environment.from_string(sources["html"]).render(names)


def payload(run: Run, signals: list[Signal], widths: Widths, settled: Settling | None) -> dict[str, Any]:
    """Everything that the page's script draws: plain types, for JSON.

    Args:
        run: The run.
        signals: As `signals_of` gives them.
        widths: The groups that experts are colored by.
        settled: How the plan settled, or None.
    """
    steps, norms = run.norms
    kept = charts.kept_steps(run)
    layers = [
        {
            "name": name,
            "curves": charts.curves([steps[i] for i in kept], norms[name][kept], name, widths) if kept else None,
            "pairs": charts.pairs(signals, name, widths),
            "rows": texts.rows(run, signals, name),
        }
        for name in run.shapes
    ]
    found: dict[str, Any] = {}
    levels = [0]
    if run.plan is not None:
        levels = charts.bit_levels(run.plan)
        found |= {f"bits-{at}": figure for at, (_, figure) in enumerate(charts.bits_heatmaps(run.plan))}
    if settled is not None:
        found["settling-chart"] = charts.settling_chart(settled)
    if run.tokens:
        found["tokens-chart"] = charts.tokens_chart(run.tokens)
    if run.comparison is not None:
        compared = charts.comparison_charts(run.comparison, set(CONTROLS))
        found |= {f"comparison-{at}": figure for at, (_, figure) in enumerate(compared)}
    return {"themes": themes(len(widths.groups), len(levels)), "layers": layers, "charts": found}


@cache
def _library() -> str:
    """plotly.js, packed."""
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    """Text as a page carries it: compressed, in base64; the same text gives the same characters."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def unpacked(text: str) -> str:
    """The inverse, for tests and for readers of the file."""
    return gzip.decompress(base64.b64decode(text)).decode()


def _correlations(run: Run, signals: list[Signal]) -> list[list[str]]:
    """Rank correlations of every two signals: the lowest, the median and the highest over all layers."""
    found = []
    for at, one in enumerate(signals):
        for other in signals[at + 1 :]:
            known = [rank for name in run.shapes if (rank := correlation(one, other, name)) is not None]
            if known:
                cells = [f"{value:+.2f}" for value in (min(known), median(known), max(known))]
                found.append([f"{one.key} and {other.key}", *cells])
    return found
