"""``moe-precision show``: the bits of every expert in a plan, a quantized checkpoint or a GGUF file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..plans.plan import PrecisionPlan
from ..present.plan_summary import plan_document, plan_lines
from .options import Commands, add_command, add_output

if TYPE_CHECKING:
    from ..export.gguf_files import GGUFExperts


def run(options: argparse.Namespace) -> None:
    """Prints a map of bits, or where two of them differ."""
    plan, file = _plan_of(options.plan)
    if options.diff:
        lines = _differences(plan, file, *_plan_of(options.diff))
        options.document = {"differences": lines}
        print("\n".join(lines) or "the plans give every expert the same bits")
        return
    options.document = plan_document(plan)
    if options.full:
        from ..present.tables import plan_table, show

        show(plan_table(plan))
    else:
        print("\n".join(plan_lines(plan)))
    if file is not None:
        options.document |= {"stored_bits": file.stored_bits, "stored_bits_in_files": file.stored_bits}
        options.document["types"] = file.types
        print(f"its file holds {file.stored_bits:.4g} bits per expert weight, scales and offsets included")
        print("types of the expert weights: " + ", ".join(f"{share:.1%} {name}" for name, share in file.types.items()))
    elif Path(options.plan).is_dir():
        from ..checkpoints.checkpoint import Checkpoint

        stored = Checkpoint(options.plan).stored_bits_per_expert_weight(plan)
        options.document["stored_bits_in_files"] = stored
        print(f"its files hold {stored:.4g} bits per expert weight, scales and offsets included")


def _plan_of(source: str) -> tuple[PrecisionPlan, GGUFExperts | None]:
    """A plan's file, or the widths that a quantized checkpoint has; the experts of a GGUF file beside them."""
    if Path(source).is_dir():
        from ..export import plan_of_checkpoint

        return plan_of_checkpoint(source), None
    if not _is_gguf(source):
        return PrecisionPlan.load(source), None  # imports neither torch nor transformers
    from ..export.gguf_files import read_gguf

    file = read_gguf(source)
    return file.plan(), file


def _is_gguf(source: str) -> bool:
    """Whether a path is a GGUF file, by its first bytes or, if they are damaged, by its name."""
    if not Path(source).is_file():
        return False
    with open(source, "rb") as opened:
        return opened.read(4) == b"GGUF" or source.endswith(".gguf")


def _differences(
    plan: PrecisionPlan, file: GGUFExperts | None, other: PrecisionPlan, other_file: GGUFExperts | None
) -> list[str]:
    """Where two plans differ; a GGUF file beside a plan or a folder takes on the names of that."""
    if file is not None and other_file is None:
        plan = file.plan_like(other)
    elif other_file is not None and file is None:
        other = other_file.plan_like(plan)
    return plan.diff(other)


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "show",
        run,
        "moe-precision show runs/demo/precision_plan.json --diff plan_2.25.json\n"
        "  moe-precision show runs/demo/quantized-plan",
    )
    command.add_argument("plan", help="a plan's JSON file, the folder of a quantized checkpoint, or a GGUF file")
    command.add_argument(
        "--full", action="store_true", help="a row for every layer and projection: which experts have the most bits"
    )
    command.add_argument("--diff", metavar="OTHER", help="a second plan or checkpoint: print where bits differ")
    add_output(command)
