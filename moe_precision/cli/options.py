"""What several commands share: how they are declared, their common options, and the data that goes with a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..layers.naming import LAYOUTS
from ..plans.methods import AUTO, AUTO_SUMMARY, METHODS, SEEDED, MethodName
from ..plans.settings import DEFAULT_AVERAGE_BITS, MAX_DROPPED, MIN_TOKENS, ZETA, PlanSettings
from ..plans.widths import GRANULARITIES
from .commands import SUMMARIES

Parser = argparse.ArgumentParser
STDLIB = "python-stdlib"  # the data set where none is named
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


def add_output(command: Parser) -> None:
    """Adds ``--json`` and ``--quiet``, for a command that sets ``options.document``; `main` does what they say."""
    group = command.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object instead of tables and lines")
    group.add_argument("--quiet", action="store_true", help="print nothing but progress, warnings and errors")


def add_dataset(command: Parser) -> None:
    """Adds ``--dataset`` and what belongs to it, and ``--tokenizer``."""
    command.add_argument(
        "--dataset",
        help="a `datasets` name; local files of text, or tables (.jsonl, .csv, .parquet); or python-stdlib (default): "
        "the standard library's source",
    )
    command.add_argument("--dataset-config", help="the configuration's name, for a `datasets` name")
    command.add_argument("--text-column", default="text", help="the text in tables and `datasets` names (default text)")
    command.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder or name of the tokenizer (default: the checkpoint's own)"
    )


def add_heldout(command: Parser) -> None:
    """Adds ``--heldout``."""
    command.add_argument(
        "--heldout",
        metavar="FILE",
        help="a file, folder or glob to judge on, all of it (default: the held-out part of --dataset, a tenth of local "
        "files)",
    )


def dataset_name(options: argparse.Namespace) -> str:
    """The training text in words."""
    return " ".join(part for part in (options.dataset or STDLIB, options.dataset_config) if part)


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
        "--total-gib", type=float, help="budget as the size of the whole model in GiB, instead of --average-bits"
    )
    command.add_argument(
        "--rest-gib",
        type=float,
        help="what everything but the experts takes, for --total-gib (default: what the checkpoint has)",
    )
    command.add_argument(
        "--bits",
        type=int,
        nargs="+",
        help="levels to choose from (default 1 2 3 4 for methods that know costs, else 2 3); with 0 among them experts "
        "may be dropped, which needs expert statistics",
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
    command.add_argument(
        "--max-dropped",
        type=float,
        default=MAX_DROPPED,
        metavar="SHARE",
        help=f"largest share of a layer's experts that may be dropped, with 0 among --bits (default {MAX_DROPPED})",
    )
    command.add_argument(
        "--min-tokens",
        type=int,
        default=MIN_TOKENS,
        metavar="N",
        help=f"tokens of the statistics below which an expert is not dropped (default {MIN_TOKENS})",
    )
    command.add_argument("--router-pattern", metavar="REGEX", help="names the routers' weights; see find_moe_layers")
    command.add_argument("--expert-pattern", metavar="REGEX", help="names the experts' weights; see find_moe_layers")
    add_layout(command)


def add_layout(command: Parser) -> None:
    """Adds ``--layout``."""
    command.add_argument(
        "--layout", choices=list(LAYOUTS), help="instead of patterns: the framework whose layout the model has"
    )


def settings_of(options: argparse.Namespace) -> PlanSettings:
    """The settings that a command with `add_plan_settings` was given."""
    return PlanSettings.among(vars(options))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def data_of(options: argparse.Namespace, checkpoint: str) -> Any:
    """The data module that goes with a checkpoint, set up with its tokenizer or the one that is named.

    Held-out text without a data set is judged on alone: there is no training text then.

    Raises:
        CheckpointError: There is no tokenizer, or one that gives no ids for text.
        ValueError: The data set cannot be used, or the tokenizer is of another model.
    """
    from moe_precision.recipes import SummarizationDataModule, TextDataModule

    from ..checkpoints.checkpoint import Checkpoint

    with Checkpoint(checkpoint) as opened:
        config, folder = opened.config, str(opened.folder)
    heldout = getattr(options, "heldout", None)
    given = {
        "dataset": options.dataset or (STDLIB if heldout is None else None),
        "dataset_config": options.dataset_config,
        "tokenizer": options.tokenizer or folder,
        "heldout": heldout,
    }
    seq2seq = config.is_encoder_decoder
    data = SummarizationDataModule(**given) if seq2seq else TextDataModule(**given, text_column=options.text_column)
    data.setup("validate")
    assert data.token_counts is not None
    vocabulary, used = config.get_text_config().vocab_size, int(data.token_counts.nonzero().max())
    if used >= vocabulary:
        raise ValueError(
            f"the tokenizer of {given['tokenizer']!r} gives ids up to {used}, but the model of {checkpoint!r} knows "
            f"{vocabulary}: it is another model's"
        )
    return data


def judged_on(data: Any) -> str:
    """What a table says of its text: where it is from, its documents and tokens, and where rare tokens are counted."""
    counted = "of the same text" if data.hparams["dataset"] is None else f"of {data.hparams['dataset']}, training part"
    return f"on {data.judged_on}; how rare a token is: by the counts {counted}"
