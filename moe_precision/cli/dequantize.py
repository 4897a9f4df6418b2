"""``moe-precision dequantize``: a packed checkpoint in, a float one out, for tools that know no packed experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dtypes import DTYPES
from ..files import check_writable
from ..quantize.dequantizing import dequantize_checkpoint
from .options import Commands, add_command


def run(options: argparse.Namespace) -> None:
    """Writes the float checkpoint and prints its size."""
    check_writable(Path(options.out).parent / "config.json")
    dequantize_checkpoint(
        options.checkpoint, options.out, dtype=DTYPES.get(options.dtype), max_shard_size=options.max_shard_size
    )
    before, after = Checkpoint(options.checkpoint), Checkpoint(options.out)
    print(f"wrote {options.out}: {before.nbytes / 1e6:.2f} MB -> {after.nbytes / 1e6:.2f} MB, {after.dtype}")


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "dequantize",
        run,
        "moe-precision dequantize runs/demo/quantized runs/demo/dequantized",
    )
    command.add_argument("checkpoint", help="folder of a checkpoint that moe-precision packed")
    command.add_argument("out", help="folder to write")
    command.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights (default auto: the checkpoint's)"
    )
    command.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="largest file (default 5GB)")
