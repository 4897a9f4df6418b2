"""``moe-precision evaluate``: loss and perplexity of a checkpoint on held-out text."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from ..checkpoints.checkpoint import load_model
from .options import Commands, add_command, add_dataset, data_of, positive


def run(options: argparse.Namespace) -> None:
    """Evaluates the checkpoint and prints a table."""
    from ..judging.evaluation import evaluate
    from ..present.tables import evaluation_table, show

    model = load_model(options.checkpoint, **({} if options.dtype == "auto" else {"dtype": options.dtype}))
    data = data_of(options, options.checkpoint, model)
    batches = list(islice(data.val_dataloader(), options.max_batches))
    show(evaluation_table({Path(options.checkpoint).name: evaluate(model, batches, data.token_counts)}))


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "evaluate",
        run,
        "Loss and perplexity of a float or packed checkpoint, overall and on the rarest tenth of target tokens, in "
        "blocks of 256 tokens (the demo uses blocks of 128, so its numbers differ).",
        "moe-precision evaluate runs/demo/quantized-plan --max-batches 20",
    )
    command.add_argument("checkpoint", help="checkpoint folder that holds its tokenizer")
    add_dataset(command)
    command.add_argument("--max-batches", type=positive, help="use at most this many validation batches of 16")
    command.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32 or bfloat16")
