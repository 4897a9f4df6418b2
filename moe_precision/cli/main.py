"""Entry point: reads the command line, runs one command, and turns user errors into one line.

Only the command that is used is imported: torch and transformers take seconds, and help needs neither.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import Any

from ..version import __version__
from .commands import SUMMARIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. User errors print one line and return 2; training raises its own.

    Ctrl-C prints one line too, with what is kept, and returns 130.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["fit"] and arguments[1:]:
        return _fit(arguments[1:])
    options = parser(arguments[:1]).parse_args(arguments)
    try:
        status = _run(options)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"moe-precision {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        left = f"; {interrupt}" if str(interrupt) else ""
        print(f"moe-precision {options.command}: interrupted{left}", file=sys.stderr)
        return 130
    return status


def _run(options: argparse.Namespace) -> int:
    """Runs a command, with what ``--json`` or ``--quiet`` says of its standard output."""
    as_json, quiet = getattr(options, "json", False), getattr(options, "quiet", False)
    with redirect_stdout(io.StringIO()) if as_json or quiet else nullcontext():
        status: int | None = options.run(options)
    if as_json and options.document is not None:  # None: another process prints it
        print(json.dumps(options.document, indent=2, allow_nan=False))
    return status or 0


def _fit(arguments: list[str]) -> int:
    """``fit`` with arguments, which LightningCLI reads; what goes wrong in training keeps its traceback."""
    fit = _module("fit")
    if arguments in (["-h"], ["--help"]):
        fit.print_help(parser(["fit"]).parse_args(["fit"]))
        return 0
    try:
        arguments = fit.with_packaged_recipes(arguments)
    except FileNotFoundError as error:
        print(f"moe-precision fit: error: {error}", file=sys.stderr)
        return 2
    from .lightning_cli import ArgumentRefused

    try:
        fit.train(arguments)
    except ArgumentRefused as error:
        print(f"moe-precision fit: error: {error}", file=sys.stderr)
        return 2
    return 0


def parser(with_options: Iterable[str] = tuple(SUMMARIES)) -> argparse.ArgumentParser:
    """The parser of all commands; ``fit``'s own options are LightningCLI's.

    Args:
        with_options: Commands that are imported for their options; the others are listed with what they do.
    """
    found = argparse.ArgumentParser(
        prog="moe-precision",
        description="Mixed-precision plans for Mixture-of-Experts models, derived from training itself.",
        epilog="moe-precision COMMAND --help explains a command, with an example.",
    )
    found.add_argument("--version", action="version", version=__version__)
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = set(with_options)
    for command, summary in SUMMARIES.items():
        if command in wanted:
            _module(command).add_to(commands)
        else:
            commands.add_parser(command, help=summary)
    return found


def _module(command: str) -> Any:
    return import_module(f".{command}", __package__)
