"""``moe-precision prune``: a float checkpoint without the experts that a plan drops."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..files import check_writable
from ..plans.beside import existing
from ..quantize.pruning import PLAN_NAME, prune_checkpoint
from .options import Commands, add_command, positive


def run(options: argparse.Namespace) -> None:
    """Writes the smaller checkpoint, and says how to quantize it."""
    check_writable(Path(options.out).parent / "config.json")
    left = prune_checkpoint(
        options.checkpoint,
        options.plan,
        options.out,
        keep=options.keep,
        curvature=existing("curvature", options.plan),
        statistics=existing("statistics", options.plan),
        max_shard_size=options.max_shard_size,
    )
    before, after = Checkpoint(options.checkpoint), Checkpoint(options.out)
    experts = next(iter(left.layers.values())).shape.num_experts
    print(
        f"wrote {options.out}: {before.nbytes / 1e6:.2f} MB -> {after.nbytes / 1e6:.2f} MB, {experts} experts a layer"
    )
    if (grid := existing("grid", options.plan)) is not None:
        print(f"{grid} is for all experts, and was left behind: what is left is rounded anew")
    print(f"to quantize it: moe-precision quantize {options.out} {Path(options.out, PLAN_NAME)} OUT")


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "prune",
        run,
        "moe-precision plan model --curvature-batches 32 --statistics-batches 32 --bits 0 1 2 3 4 -o plan.json\n"
        "  moe-precision prune model plan.json pruned --keep 6",
    )
    command.add_argument("checkpoint", help="folder of the float checkpoint")
    command.add_argument(
        "plan", help="a plan with 0 among its levels; curvature and statistics beside it are cut alike"
    )
    command.add_argument("out", help="folder to write")
    command.add_argument(
        "--keep",
        type=positive,
        metavar="N",
        help="experts to keep in every layer, those whose absence costs most (default: those that the plan keeps, if "
        "they are as many in every layer)",
    )
    command.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="largest file (default 5GB)")
