"""``moe-precision show``: the bits of every expert in a plan or a quantized checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..plans.plan import PrecisionPlan
from ..present.plan_summary import plan_document, plan_lines
from .options import Commands, add_command, add_output


def run(options: argparse.Namespace) -> None:
    """Prints a map of bits, or where two of them differ."""
    plan = _plan_of(options.plan)
    if options.diff:
        lines = plan.diff(_plan_of(options.diff))
        options.document = {"differences": lines}
        print("\n".join(lines) or "the plans give every expert the same bits")
        return
    options.document = plan_document(plan)
    if options.full:
        from ..present.tables import plan_table, show

        show(plan_table(plan))
    else:
        print("\n".join(plan_lines(plan)))
    if Path(options.plan).is_dir():
        from ..checkpoints.checkpoint import Checkpoint

        stored = Checkpoint(options.plan).stored_bits_per_expert_weight(plan)
        options.document["stored_bits_in_files"] = stored
        print(f"its files hold {stored:.4g} bits per expert weight, scales and offsets included")


def _plan_of(source: str) -> PrecisionPlan:
    """A plan's file, or the widths that a quantized checkpoint has."""
    if not Path(source).is_dir():
        return PrecisionPlan.load(source)  # imports neither torch nor transformers
    from ..export import plan_of_checkpoint

    return plan_of_checkpoint(source)


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "show",
        run,
        "moe-precision show runs/demo/precision_plan.json --diff plan_2.25.json\n"
        "  moe-precision show runs/demo/quantized-plan",
    )
    command.add_argument("plan", help="a plan's JSON file, or the folder of a quantized checkpoint")
    command.add_argument(
        "--full", action="store_true", help="a row for every layer and projection: which experts have the most bits"
    )
    command.add_argument("--diff", metavar="OTHER", help="a second plan or checkpoint: print where bits differ")
    add_output(command)
