"""``moe-precision fit``: LightningCLI, and two flags for recipes that end training on a precision plan."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

import moe_precision.callbacks  # noqa: F401  so that YAML may name the callbacks without their module

from ..errors import MoEPrecisionError

_REFUSED = re.compile(r"class_path '([\w.]+)':\s+Option '(\S+)' is not accepted")


_OF_A_UNION = re.compile(r"Does not validate against any of the Union subtypes.*?Errors:\s*- (.*?)(?=\n\s*- |\Z)", re.S)


def _first_reason(message: str) -> str:
    """A message on one line; of jsonargparse's list of what each type in a union does not take, the first."""
    found = _OF_A_UNION.search(message)
    return " ".join((found[1] if found else message).split())


class ArgumentRefused(MoEPrecisionError, ValueError):
    """A value of ``fit`` with which nothing can be trained."""


class _Parser(LightningArgumentParser):
    """Says what is wrong with the arguments in one line, without the usage of 60."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        refused = _REFUSED.search(message)
        line = f"{refused[1]} has no option {refused[2]!r}" if refused else " ".join(message.split())
        print(f"moe-precision fit: error: {line}; `moe-precision fit --help` lists the options", file=sys.stderr)
        sys.exit(2)


class FitCLI(LightningCLI):
    """LightningCLI with ``--plan`` and ``--train``."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        made = super().init_parser(**kwargs)
        made.__class__ = _Parser  # whatever made it, only its errors differ
        return made

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--plan", type=str | None, default=None, help="precision plan that training ends on")
        parser.add_argument(
            "--train",
            type=Literal["all", "routers"],
            default="all",
            help="routers: pack the checkpoint's experts by the plan and train the routers alone, for little memory",
        )

    def instantiate_classes(self) -> None:
        """Refuses values in one line; what goes wrong in training, later, keeps its traceback.

        Raises:
            ArgumentRefused: A class, or what is done before, does not take a value.
        """
        try:
            self._set_plan()
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            first = error
            while isinstance(first.__context__, ValueError | OSError):  # jsonargparse wraps it in its own words
                first = first.__context__
            raise ArgumentRefused(_first_reason(str(first))) from error

    def _set_plan(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        anneals = [c for c in callbacks if c.class_path.rpartition(".")[2] == "PrecisionAnneal"]
        if config.plan is not None:
            if not Path(config.plan).is_file():
                raise FileNotFoundError(f"--plan {config.plan!r}: no such file")
            if not anneals:
                raise ValueError("--plan is for a recipe with PrecisionAnneal among its callbacks; this one has none")
            for anneal in anneals:
                anneal.init_args.plan = config.plan
        if config.train == "routers":
            config.trainer.callbacks = [c for c in callbacks if c not in anneals]
            self._routers_only(config, anneals)

    def _routers_only(self, config: Any, anneals: list[Any]) -> None:
        """Moves the plan from the callback, which is left out, to the model."""
        plans = [anneal.init_args.plan for anneal in anneals if anneal.init_args.plan is not None]
        if not plans:
            raise ValueError("--train routers packs experts by an existing plan: give --plan")
        arguments = config.model.init_args if "init_args" in config.model else config.model
        if "train" not in arguments:
            raise ValueError(
                f"--train routers needs a model with the argument 'train', such as CausalLM; got {config.model}"
            )
        arguments.train, arguments.plan = "routers", plans[0]
