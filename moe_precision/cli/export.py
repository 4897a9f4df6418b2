"""``moe-precision export``: a plan as the config of another quantizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..export import ENGINES, TARGETS, export
from ..files import check_writable, replaced_when_done
from .options import Commands, add_command


def run(options: argparse.Namespace) -> None:
    """Prints or writes the config."""
    if options.output is not None:
        if Path(options.output).exists():
            raise FileExistsError(f"{options.output!r} exists; name another file with -o")
        check_writable(options.output)
    if Path(options.plan).is_dir():
        raise ValueError(f"{options.plan!r} is a folder; give a plan's JSON file")
    found = export(options.plan, options.to, options.engine)
    print("\n".join(f"note: {note}" for note in found.notes), file=sys.stderr)
    if options.output is None:
        print(found.text, end="")
        return
    with replaced_when_done(options.output) as temporary:
        temporary.write_text(found.text, encoding="utf-8")
    print(f"wrote {options.output}")


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "export",
        run,
        "moe-precision export runs/demo/precision_plan.json --to autoround > layer_config.json",
    )
    command.add_argument("plan", help="a plan's JSON file")
    command.add_argument("--to", required=True, choices=list(TARGETS), help="which quantizer's config")
    command.add_argument(
        "--engine",
        choices=list(ENGINES),
        help="the checkpoint is for this inference engine, which wants one format per layer (for autoround, gptqmodel "
        "and llm-compressor)",
    )
    command.add_argument("-o", "--output", metavar="FILE", help="write to a file (default: print)")
