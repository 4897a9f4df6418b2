"""Tables for the terminal, in Markdown so that they can be pasted."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..layers.moe_layers import MoELayer
from ..plans.plan import PrecisionPlan
from ..recording.masters import master_kind
from .plan_summary import findings

if TYPE_CHECKING:
    from ..judging.comparison import Comparison
    from ..judging.divergence import Divergence
    from ..judging.evaluation import Evaluation


def show(table: Table) -> None:
    """Prints a table wide enough that Markdown rows stay on one line each."""
    Console(width=240, force_jupyter=False).print(table)


def as_text(table: Table) -> str:
    """A table as lines of text, for a log message."""
    console = Console(width=160, file=io.StringIO(), force_jupyter=False)  # there it shows instead of writing
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line for line in lines if line.strip())


def layers_table(layers: list[MoELayer]) -> Table:
    """What was found: one row for all layers that are alike, their indices in braces."""
    alike: dict[tuple[Any, ...], list[list[str]]] = {}
    for layer in layers:
        router = layer.router.removeprefix(layer.name).lstrip(".")
        name, indices = re.sub(r"\d+", "{}", layer.name), re.findall(r"\d+", layer.name)
        key = (name, router, layer.num_experts, tuple(layer.projections.items()), _read_as(layer), layer.caveat)
        alike.setdefault(key, []).append(indices)
    table = Table(box=box.MARKDOWN)
    for column in ("layers", "router", "experts", "matrices of an expert (out, in)", "router read as"):
        table.add_column(column, overflow="fold")
    for (name, router, experts, projections, read_as, caveat), indices in alike.items():
        ranges = [_ranges(column) for column in zip(*indices, strict=True)]
        matrices = ", ".join(f"{projection}: {out} x {inp}" for projection, (out, inp) in projections)
        note = f" ({caveat} router)" if caveat else ""
        table.add_row(name.format(*ranges), router + note, str(experts), matrices, read_as)
    return table


def _read_as(layer: MoELayer) -> str:
    """The dtype of what norms are read from, and whose copy that is where it is not the model's parameter."""
    owner = master_kind([layer])
    return f"float32 ({owner} copy)" if owner else str(layer.router_is.dtype).removeprefix("torch.")


def _ranges(numbers: Sequence[str]) -> str:
    """``("0", "1", "2", "5")`` as ``{0-2,5}``."""
    runs: list[list[int]] = []
    for number in sorted({int(number) for number in numbers}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(runs) == 1 and len(runs[0]) == 1 else "{" + ",".join(texts) + "}"


def plan_table(plan: PrecisionPlan) -> Table:
    """One row per layer: how many experts have which bits, and which experts have the most."""
    table = Table(title=escape("; ".join(findings(plan))), box=box.MARKDOWN, title_justify="left")
    seen = plan.notes["statistics"]["tokens"] if "statistics" in plan.notes else {}
    tokens = ["tokens per expert: least, median, most"] if seen else []
    for column in ("layer", "projection", "experts by bits", "most bits to experts", *tokens):
        table.add_column(column, overflow="fold")
    for name, layer in plan.layers.items():
        projections = layer.projection_bits
        if all(widths == next(iter(projections.values())) for widths in projections.values()):
            projections = {"all": layer.bits}
        for projection, widths in projections.items():
            counts = sorted(Counter(widths).items(), reverse=True)
            by_bits = ", ".join(f"{count} x {bits}" for bits, count in counts)
            top = [e for e in layer.order or range(len(widths)) if widths[e] == counts[0][0]]
            most = "all" if len(counts) == 1 else " ".join(map(str, top))
            table.add_row(name, projection, by_bits, most, *([", ".join(f"{n:,}" for n in seen[name])] if seen else []))
    return table


def evaluation_table(
    results: dict[str, Evaluation], divergences: dict[str, Divergence] | None = None, text: str = ""
) -> Table:
    """One row per model: loss and perplexity, overall and on the rarest tenth of the target tokens.

    Args:
        results: By the model's name.
        divergences: Of the models that were measured against a float model; adds their columns.
        text: What they were evaluated on, in words; the title.
    """
    table = Table(title=escape(text) or None, box=box.MARKDOWN, title_justify="left")
    columns = ["model", "loss", "perplexity", "loss, rarest 10 %", "perplexity, rarest 10 %", "tokens"]
    columns += [] if divergences is None else ["KL to float", "KL, 99 %", "KL, 99.9 %", "top-1", "same experts"]
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, r in results.items():
        cells = [f"{r.loss:.4f}", f"{r.perplexity:.3f}", f"{r.rare_loss:.4f}", f"{r.rare_perplexity:.2f}"]
        cells.append(str(r.tokens))
        if divergences is not None and name in divergences:
            d = divergences[name]
            cells += [f"{d.kl:.5f}", f"{d.kl_99:.4f}", f"{d.kl_999:.4f}", f"{d.top1:.1%}"]
            cells.append("-" if d.same_experts is None else f"{d.same_experts:.1%}")
        table.add_row(name, *cells, *["-"] * (len(columns) - len(cells) - 1))
    return table


def evaluation_document(
    results: dict[str, Evaluation], divergences: dict[str, Divergence], text: str
) -> dict[str, Any]:
    """What `evaluation_table` shows as plain types, for ``--json``."""
    models = {
        name: asdict(result) | (asdict(divergences[name]) | {"tokens": result.tokens} if name in divergences else {})
        for name, result in results.items()
    }
    return {"text": text, "models": models}


def comparison_table(comparison: Comparison) -> Table:
    """One row per method and budget: stored bits, the loss increase with intervals, overall and in the tail, and KL."""
    every = {row.divergence.every for row in comparison.rows} - {1}
    text = f" ({escape(comparison.text)})" if comparison.text else ""
    title = (
        f"{comparison.model_type}, float loss {comparison.loss['all']:.4f} (rare {comparison.loss['rare']:.4f}), "
        f"{int(comparison.counts.sum())} tokens of {len(comparison.counts)} documents{text}, levels "
        f"{comparison.levels}, group {comparison.group_size}; increase in nats per token, with 95 % intervals over "
        "documents; KL to the float model and top-1 agreement with it"
        + "".join(f" on one in {k} of the tokens" for k in every)
    )
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    columns = ["method", "bits", "stored bits", "loss", "KL", "top-1"]
    columns += ["frequent half", "rarest tenth", "worst tenth of documents"]
    columns += [comparison.task_name] if comparison.task_name else []
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    brackets = [row for row in comparison.rows if row.asked_bits is None]
    for row in [*brackets, *(row for budget in comparison.budgets for row in comparison.at(budget))]:
        name = f"{row.name} ({len(row.draws)} draws)" if row.draws else row.name
        cells = [name, f"{row.average_bits:.3g}", f"{row.stored_bits:.3f}", str(row.mean)]
        cells += [f"{row.divergence.kl:.5f}", f"{row.divergence.top1:.1%}"]
        cells += [str(row.bands["frequent"]), str(row.bands["rare"]), f"{row.worst_decile:.4f}"]
        cells += ["-" if row.task is None else f"{row.task:.4f}"] if comparison.task_name else []
        table.add_row(*cells)
    return table


def correlation_table(comparison: Comparison) -> Table:
    """One row per signal: Spearman's correlation with the measured sensitivity, over all experts and by layer."""
    table = Table(title="rank correlation with the measured sensitivity", box=box.MARKDOWN, title_justify="left")
    layers = list(next(iter(comparison.correlations.values())))
    shown = layers if len(layers) <= 9 else layers[:1]
    for column in ("signal", *("all experts" if layer == "all" else layer for layer in shown)):
        table.add_column(column, justify="left" if column == "signal" else "right", overflow="fold")
    for signal, values in comparison.correlations.items():
        table.add_row(signal, *(f"{values[layer]:.2f}" for layer in shown))
    return table
