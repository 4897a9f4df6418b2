"""Tables for the terminal, in Markdown so that they can be pasted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from .plan import PrecisionPlan

if TYPE_CHECKING:
    from .evaluation import Evaluation


def show(table: Table) -> None:
    """Prints a table wide enough that Markdown rows stay on one line each."""
    Console(width=160).print(table)


def plan_table(plan: PrecisionPlan) -> Table:
    """A row a layer: how many experts have which bits, and which experts have the most."""
    step = plan.baseline_step
    baseline = "no baseline: ranked by final norm" if step is None else f"baseline step {step}"
    title = (
        f"{plan.model_type}, method {plan.method}, {baseline}; asked {plan.asked_average_bits:g}, "
        f"reached {plan.average_bits:.4g} bits on average, {plan.stored_bits:.4g} stored (group {plan.group_size})"
    )
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for column in ("layer", "projection", "experts by bits", "most bits to experts"):
        table.add_column(column, overflow="fold")
    for name, layer in plan.layers.items():
        projections = layer.projection_bits
        if all(widths == next(iter(projections.values())) for widths in projections.values()):
            projections = {"all": layer.bits}
        for projection, widths in projections.items():
            counts = sorted(Counter(widths).items(), reverse=True)
            by_bits = ", ".join(f"{count} x {bits}" for bits, count in counts)
            top = [e for e in layer.order or range(len(widths)) if widths[e] == counts[0][0]]
            table.add_row(name, projection, by_bits, "all" if len(counts) == 1 else " ".join(map(str, top)))
    return table


def evaluation_table(results: dict[str, Evaluation]) -> Table:
    """A row a model: loss and perplexity, mean and on the rarest tenth of the target tokens."""
    table = Table(box=box.MARKDOWN)
    for column in ("model", "loss", "perplexity", "loss, rarest 10 %", "perplexity, rarest 10 %", "tokens"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, r in results.items():
        cells = (f"{r.loss:.4f}", f"{r.perplexity:.3f}", f"{r.rare_loss:.4f}", f"{r.rare_perplexity:.2f}")
        table.add_row(name, *cells, str(r.tokens))
    return table
