"""``moe-precision report``: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import check_writable
from ..present.report.page import check_installed, write_report
from .options import Commands, add_command


def run(options: argparse.Namespace) -> None:
    """Writes the page and says how large it is."""
    check_installed()
    if options.output is not None:
        check_writable(options.output)
    path: Path = write_report(options.run_folder, options.output)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "report",
        run,
        "moe-precision report runs/demo\n  moe-precision report runs/demo/precision_plan.json -o report.html",
    )
    command.add_argument("run_folder", metavar="RUN", help="the folder of a run, or the plan (x.json) or history in it")
    command.add_argument("-o", "--output", metavar="HTML", help="default: report.html beside the plan")
