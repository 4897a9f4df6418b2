"""Entry point: reads the command line, runs one command, and turns user errors into one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from . import compare, demo, evaluate, export, fit, plan, quantize, show

COMMANDS = (fit, plan, show, compare, quantize, export, evaluate, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. User errors print one line and return 2; training raises its own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["fit"] and arguments[1:]:
        return _fit(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"moe-precision {options.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _fit(arguments: list[str]) -> int:
    """``fit`` with arguments, which LightningCLI reads; what goes wrong in training keeps its traceback."""
    if arguments in (["-h"], ["--help"]):
        commands = parser()._subparsers
        assert commands is not None
        fit.print_help(commands._group_actions[0].choices["fit"])  # type: ignore[index]
        return 0
    try:
        arguments = fit.with_packaged_recipes(arguments)
    except FileNotFoundError as error:
        print(f"moe-precision fit: error: {error}", file=sys.stderr)
        return 2
    fit.train(arguments)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``fit``'s own options are LightningCLI's."""
    found = argparse.ArgumentParser(
        prog="moe-precision",
        description="Mixed-precision plans for Mixture-of-Experts models, derived from training itself.",
        epilog="moe-precision COMMAND --help explains a command, with an example.",
    )
    found.add_argument("--version", action="version", version=__version__)
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return found
