"""What several commands share: how they are declared, their common options, and the data that goes with a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..plans.methods import AUTO, AUTO_SUMMARY, METHODS, SEEDED, MethodName
from ..plans.settings import DEFAULT_AVERAGE_BITS, ZETA, PlanSettings
from ..plans.widths import GRANULARITIES
from .commands import SUMMARIES

Parser = argparse.ArgumentParser
Commands = Any  # what `ArgumentParser.add_subparsers` returns; argparse does not export its type


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], example: str) -> Parser:
    """Declares a command of `SUMMARIES`; its help ends with an example.

    Args:
        commands: Where to add it.
        name: What users type.
        run: Carries it out; may return the exit status.
        example: A command line, or several.
    """
    command: Parser = commands.add_parser(
        name,
        help=SUMMARIES[name],
        description=SUMMARIES[name],
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_dataset(command: Parser) -> None:
    """Adds ``--dataset`` and ``--dataset-config``."""
    command.add_argument(
        "--dataset",
        default="python-stdlib",
        help="a `datasets` name, local text files, or python-stdlib (default): the standard library's source",
    )
    command.add_argument("--dataset-config", help="the configuration's name, for a `datasets` name")


def dataset_name(options: argparse.Namespace) -> str:
    """The data set in words."""
    return " ".join(part for part in (options.dataset, options.dataset_config) if part)


def add_levels(command: Parser) -> None:
    """Adds ``--bits`` and ``--group-size``."""
    command.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="levels to choose from (default 2 3)")
    _add_group_size(command)


def _add_group_size(command: Parser) -> None:
    command.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")


def add_plan_settings(command: Parser, methods: tuple[MethodName, ...]) -> None:
    """Adds all options of `PlanSettings`, under their own names."""
    listed = "; ".join(f"{name}: {AUTO_SUMMARY if name == AUTO else METHODS[name].summary}" for name in methods)
    command.add_argument("--method", default=AUTO, choices=methods, metavar="METHOD", help=f"{listed} (default {AUTO})")
    command.add_argument("--average-bits", type=float, help=f"bits per expert weight (default {DEFAULT_AVERAGE_BITS})")
    command.add_argument(
        "--stored-bits", type=float, help="budget with scales and offsets included, instead of --average-bits"
    )
    command.add_argument(
        "--expert-gib", type=float, help="budget as the size of all routed experts in GiB, instead of --average-bits"
    )
    command.add_argument(
        "--bits",
        type=int,
        nargs="+",
        help="levels to choose from (default 1 2 3 4 for methods that know costs, else 2 3)",
    )
    _add_group_size(command)
    command.add_argument(
        "--granularity",
        choices=list(GRANULARITIES),
        help="what shares a width (default expert+projection for methods that know costs, else expert, the only one "
        "that they take)",
    )
    command.add_argument("--seed", type=int, default=0, help=f"for --method {' and '.join(SEEDED)}")
    command.add_argument("--zeta", type=float, default=ZETA, help="factor of the paper's reorder rule (default 3)")
    command.add_argument("--router-pattern", metavar="REGEX", help="names the routers' weights; see find_moe_layers")
    command.add_argument("--expert-pattern", metavar="REGEX", help="names the experts' weights; see find_moe_layers")


def settings_of(options: argparse.Namespace) -> PlanSettings:
    """The settings that a command with `add_plan_settings` was given."""
    known = {one.name for one in fields(PlanSettings)}
    return PlanSettings(**{key: value for key, value in vars(options).items() if key in known})


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def data_of(options: argparse.Namespace, checkpoint: str, model: Any) -> Any:
    """The data module that goes with a checkpoint's model, set up with its tokenizer."""
    from moe_precision.recipes import SummarizationDataModule, TextDataModule

    module = SummarizationDataModule if model.config.is_encoder_decoder else TextDataModule
    data = module(dataset=options.dataset, dataset_config=options.dataset_config, tokenizer=checkpoint)
    data.setup("validate")
    return data
