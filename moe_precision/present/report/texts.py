"""Words and tables of the report: facts, commands, settings, comparisons."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...plans.settings import BUDGETS, expert_weights
from ..settling import Settling
from .charts import Figure, comparison_charts, digits, row_name
from .run import Run
from .signals import Signal


@dataclass(frozen=True)
class Fact:
    """One figure at the head of the page."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Command:
    """A command line, and what it is for."""

    purpose: str
    line: str


@dataclass(frozen=True)
class ResultTable:
    """A table of results, the names of its charts, and a verdict in sentences."""

    text: str
    columns: list[str]
    rows: list[list[str]]
    charts: list[str] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)


def subtitle(run: Run) -> str:
    """Layers, experts, steps."""
    experts = sorted({shape.num_experts for shape in run.shapes.values()})
    number = str(experts[0]) if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    found = f"{len(run.shapes)} MoE layer{'s' * (len(run.shapes) > 1)} with {number} experts"
    if (steps := run.norms[0]) and run.history is not None:
        found += f"; {len(steps):,} records from step {steps[0]:,} to step {steps[-1]:,}"
    return found


def facts(run: Run, settled: Settling | None) -> list[Fact]:
    """The figures at the head."""
    found = []
    if (plan := run.plan) is not None:
        asked = "" if plan.settings is None or not hasattr(plan.settings, "budget") else _budget(run)
        found.append(Fact("average bits", f"{plan.average_bits:.4g}", asked))
        found.append(
            Fact("stored bits", f"{plan.stored_bits:.4g}", f"with scales and offsets, group {plan.group_size}")
        )
        weights = expert_weights(run.shapes.values())
        found.append(Fact("experts take", _size(weights * plan.stored_bits), f"{_size(weights * 16)} at 16 bits"))
        found.append(Fact("method", plan.method, str(plan.notes.get("auto", ""))))
    if settled is not None:
        value = "not yet" if settled.settled_at == settled.steps[-1] else f"step {settled.settled_at:,}"
        found.append(Fact("settled", value, "the plan by router norms"))
    if run.tokens:
        least = min(int(of.min()) for of in run.tokens.values())
        found.append(Fact("tokens behind statistics", f"{least:,}", "of the expert with the least"))
    return found


def _size(bits: float) -> str:
    gib = bits / 2**33
    return f"{gib:.3g} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"


def _budget(run: Run) -> str:
    assert run.plan is not None
    assert run.plan.settings is not None
    settings = run.plan.settings
    known = any(getattr(settings, key, None) is not None for key in BUDGETS)
    return f"asked for {settings.budget}" if known else ""


def commands(run: Run) -> list[Command]:
    """What to type next."""
    plan, history, folder = str(run.files.plan), str(run.files.history), run.files.plan.parent
    checkpoint = "CHECKPOINT" if run.checkpoint is None else str(run.checkpoint)
    where = "" if run.checkpoint is not None else "; in place of CHECKPOINT name the folder of the float checkpoint"
    if run.plan is None:
        line = ["plan", history, "--average-bits", "2.5", "-o", plan]
        return [Command("Make a plan from the recorded norms:", _line(line))]
    quantized = folder / "quantized"
    found = [
        Command(f"Quantize the checkpoint by this plan{where}:", _line(["quantize", checkpoint, plan, str(quantized)]))
    ]
    if (quantized / "config.json").is_file():
        line = ["evaluate", str(quantized), "--reference", checkpoint, "--card"]
        found.insert(0, Command("Measure the quantized model against the float model:", _line(line)))
    group = ["--group-size", str(run.plan.group_size)]
    if run.history is not None and run.comparison is None:
        line = ["compare", checkpoint, history, *group, "--output", str(folder / "comparison.json")]
        found.append(
            Command(f"Judge every method on this model{where}; the report then shows the result:", _line(line))
        )
    if run.history is not None:
        line = ["plan", history, "--average-bits", "2", *group, "-o", str(folder / "plan_2.json")]
        if run.checkpoint is not None:
            line[2:2] = ["--final", checkpoint]
        found.append(Command("Make a plan at another budget, without training again:", _line(line)))
    return found


def _line(words: list[str]) -> str:
    return f"moe-precision {shlex.join(words)}"


def curves(run: Run, drawn: int) -> str:
    """What the curves show, and how many of the records."""
    steps = run.norms[0]
    if not steps:
        return "No norms were recorded."
    found = "The L2 norm of each expert's router row."
    found += " Colors and symbols tell how many bits an expert gets; the legend hides and shows them." * bool(run.plan)
    if drawn < len(steps):
        found += f" Drawn are {drawn} of {len(steps):,} records, evenly spaced, the first and the last among them."
    return f"{found} The arrows and lists choose the layer, and an expert to mark."


def of_axes(figure: Figure) -> str:
    """What a scatter plot shows, for screen readers."""
    layout = figure["layout"]
    return f"{layout['yaxis']['title']['text']} against {layout['xaxis']['title']['text']}"


def pairs(signals: list[Signal]) -> str:
    """Which signals are not there."""
    named = {"change": "the change of norm", "load": "the load", "curvature": "the curvature"}
    absent = [text for key, text in named.items() if key not in {signal.key for signal in signals}]
    found = (
        "Each point is an expert of the layer, in the color and with the symbol of its curve; g is the loss's gradient."
    )
    return f"{found} Not recorded: {' and '.join(absent)}." if absent else found


def columns(run: Run, signals: list[Signal]) -> list[str]:
    """The head of the table of experts."""
    return ["expert", *_projections(run), *(["last norm"] if run.norms[0] else []), *(signal.key for signal in signals)]


def _projections(run: Run) -> list[str]:
    if run.plan is None:
        return []
    return [
        f"bits of {name}" for name in dict.fromkeys(n for of in run.plan.layers.values() for n in of.projection_bits)
    ]


def rows(run: Run, signals: list[Signal], layer: str) -> list[list[Any]]:
    """One row for each expert of a layer, under `columns`."""
    steps, norms = run.norms
    number = run.shapes[layer].num_experts
    cells: list[list[Any]] = [list(range(number))]
    if run.plan is not None:
        known = run.plan.layers[layer].projection_bits
        names = [name.removeprefix("bits of ") for name in _projections(run)]
        cells += [list(known.get(name, [None] * number)) for name in names]
    if steps:
        cells.append(digits(norms[layer][-1]))
    cells += [digits(signal.values[layer], 5) for signal in signals]
    return [list(row) for row in zip(*cells, strict=True)]


def bits(run: Run) -> str:
    """What the heatmap shows."""
    if run.plan is None:
        return ""
    return (
        f"The plan gives {run.plan.average_bits:.4g} bits on average. Each cell is an expert; a click on it shows its "
        "layer above, and marks it there."
    )


def settling(run: Run, settled: Settling | None) -> str:
    """When no expert's bits changed any more."""
    if run.history is None:
        return ""
    if settled is None:
        return (
            "At least three records of finite norms are needed, the baseline among them, to tell when a plan settled."
        )
    end = settled.steps[-1]
    when = (
        f"From step {settled.settled_at:,} on no expert's bits changed"
        if settled.settled_at < end
        else "Bits still changed with the last record"
    )
    other = run.plan is not None and run.plan.method not in ("router_norm", "norm_only")
    why = (
        f" The plan of this run is by method {run.plan.method}, of which no history is kept." * other
        if run.plan
        else ""
    )
    by = f"in a plan by the change of router norms alone at {settled.budget}"
    records = len(run.history.steps) - 1
    thinned = f" Of {records:,} records {len(settled.steps)} were looked at." * (len(settled.steps) < records)
    return f"{when}, {by}; training ended at step {end:,}.{thinned}{why}"


def tokens(run: Run) -> str:
    """What the statistics rest on."""
    if not run.tokens:
        return ""
    none = sum(int((of == 0).sum()) for of in run.tokens.values())
    unseen = f" {none} experts saw none, and are rounded without statistics." if none else ""
    return f"Taken from {run.statistics_text or 'text that the file does not name'}.{unseen}"


def settings(run: Run) -> list[tuple[str, str]]:
    """What was asked for, what was found, and the versions."""
    if run.plan is None:
        return []
    document = run.plan.to_dict()
    found = {"model type": run.plan.model_type, "method": run.plan.method, "group size": str(run.plan.group_size)}
    found |= {f"setting: {key}": _plain(value) for key, value in (document["settings"] or {}).items()}
    found |= {f"note: {key}": _plain(value) for key, value in document["notes"].items() if key != "statistics"}
    found |= {f"version of {key}": value for key, value in document["created_by"].items()}
    return list(found.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tables(run: Run) -> list[ResultTable]:
    """Results of `compare` and of the demo."""
    found = []
    if (comparison := run.comparison) is not None:
        names = ["method", "bits", "stored bits", "loss", "95 % interval", "KL", "top-1"]
        cells = [
            [
                row_name(row),
                f"{row['average_bits']:.3g}",
                f"{row['stored_bits']:.3f}",
                _number(row["increase"]["value"], ".5f"),
                f"{_number(row['increase']['low'], '.5f')} to {_number(row['increase']['high'], '.5f')}",
                _number(row["divergence"]["kl"], ".5f"),
                _number(row["divergence"]["top1"], ".1%"),
            ]
            for row in sorted(
                comparison["rows"], key=lambda row: (row["asked_bits"] or 0.0, row["increase"]["value"] or 0.0)
            )
        ]
        text = (
            "Result of compare: increase of the loss over the float model's "
            f"{_number(comparison['loss'].get('all'), '.4f')}, in nats per token, over "
            f"{comparison['tokens']:,} tokens of {comparison['documents']:,} documents "
            f"({comparison['text'] or 'text that the file does not name'}). Hollow points are controls."
        )
        drawn = [name for name, _ in comparison_charts(comparison, set())]
        found.append(ResultTable(text, names, cells, drawn, list(comparison.get("verdict", []))))
    if run.demo:
        names = ["model", "bits", "stored bits", "file MB", "KL", "top-1", "loss", "loss, rarest 10 %"]
        cells = [
            [
                row["model"],
                _number(row["nominal_bits"], ".3g"),
                _number(row["stored_bits"], ".2f"),
                _number(row["file_mb"], ".2f"),
                _number((row["divergence"] or {}).get("kl"), ".5f"),
                _number((row["divergence"] or {}).get("top1"), ".1%"),
                _number(row["evaluation"]["loss"], ".4f"),
                _number(row["evaluation"]["rare_loss"], ".4f"),
            ]
            for row in run.demo
        ]
        text = f"The demo's models, over {run.demo[0]['evaluation']['tokens']:,} validation tokens."
        found.append(ResultTable(text, names, cells))
    return found


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def sections(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Links to the sections that the page has."""
    shown = [("next", "Next", True), ("layers", "Router norms", True), ("bits", "Bits", names["bits"])]
    shown += [("settling", "Settling", names["settling_text"]), ("tokens", "Tokens", names["tokens_text"])]
    shown += [("comparison", "Comparison", names["tables"]), ("settings", "Settings", names["settings"])]
    return [(where, name) for where, name, there in [*shown, ("files", "Files", True)] if there]
