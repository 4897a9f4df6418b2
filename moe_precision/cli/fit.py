"""``moe-precision fit``: trains a recipe, given as a file or by the name of one in the package."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from .options import Commands, add_command

_BARE_NAME = re.compile(r"[\w-]+(?:\.yaml)?$")


def train(arguments: Sequence[str]) -> Any:
    """Trains a recipe: ``LightningCLI fit`` with these arguments; returns the data module that it trained on."""
    from .lightning_cli import FitCLI

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    try:
        return FitCLI(
            args=["fit", *with_packaged_recipes(arguments)], save_config_kwargs={"overwrite": True}
        ).datamodule
    except BaseException:
        _finish_wandb()
        raise


def _finish_wandb() -> None:
    """Ends the run of Weights & Biases, if there is one, which else writes its lines below the error at exit."""
    if getattr(wandb := sys.modules.get("wandb"), "run", None) is not None:
        wandb.finish(exit_code=1)  # type: ignore[union-attr]


def with_packaged_recipes(arguments: Sequence[str]) -> list[str]:
    """The arguments with the name of a packaged recipe after ``--config`` replaced by its path.

    A file of that name comes first. ``pretrain_mixtral`` and ``pretrain_mixtral.yaml`` are the same recipe.

    Raises:
        FileNotFoundError: The name is neither a file nor a recipe of the package.
    """
    found = list(arguments)
    for index, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            found[index] = f"{flag}={_recipe(value)}"
        elif index + 1 < len(found):
            found[index + 1] = _recipe(found[index + 1])
    return found


def _recipe(value: str) -> str:
    """The path of a packaged recipe for its bare name; a path, or a config written out, is left to LightningCLI."""
    if not _BARE_NAME.match(value) or Path(value).is_file():
        return value
    known = recipes()
    name = value.removesuffix(".yaml")
    if name in known:
        return str(known[name])
    raise FileNotFoundError(
        f"--config {value!r}: no such file, and not one of the packaged recipes: {', '.join(known)}"
    )


def recipes() -> dict[str, Path]:
    """The recipes of the package by name."""
    folder = Path(str(files("moe_precision.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def print_help(options: argparse.Namespace) -> None:
    """Prints what the command does, its recipes, and the options of LightningCLI; does not return."""
    from .lightning_cli import FitCLI

    options.run(options)
    print("\noptions, each also a key of the YAML:\n", flush=True)
    FitCLI(args=["fit", "--help"])


def _purpose(recipe: Path) -> str:
    """The first sentence of a recipe, in the comment that it begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.strip("# "), lines))
    return comment.partition(". ")[0].rstrip(".")


def add_to(commands: Commands) -> None:
    """Declares the command."""
    listed = "\n".join(f"  {name}: {_purpose(path)}" for name, path in recipes().items())
    command = add_command(
        commands,
        "fit",
        lambda options: commands.choices["fit"].print_help(),
        "moe-precision fit --config pretrain_mixtral --trainer.max_steps 200",
    )
    command.epilog = f"recipes:\n{listed}\n\n{command.epilog}"
