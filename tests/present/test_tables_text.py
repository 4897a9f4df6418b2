"""Tables say which text their figures rest on."""

from rich import box
from rich.table import Table

from moe_precision import allocate
from moe_precision.present.tables import as_text, plan_table
from tests.support.models import build


def test_a_plan_names_the_text_that_it_was_measured_on():
    plan = allocate(build("mixtral"), method="uniform", average_bits=2, group_size=64)
    assert "measured on" not in as_text(plan_table(plan))
    plan.notes["text"] = "training batches of [my] text"  # brackets are no markup
    assert "measured on training batches of [my] text" in " ".join(as_text(plan_table(plan)).split())


def test_a_table_is_text_in_a_notebook_too(monkeypatch):
    """There rich shows what is printed, whatever file it is given, and the message would be empty."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    table = Table("a", "b", box=box.MARKDOWN)
    table.add_row("1", "2")
    assert as_text(table) == "| a | b |\n|---|---|\n| 1 | 2 |"
