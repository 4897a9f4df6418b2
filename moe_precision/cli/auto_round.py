"""``moe-precision quantize --backend auto-round``: AutoRound carries out the plan, in its own format."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.tokenizer import load_tokenizer
from ..export import auto_round_backend
from .options import data_of, dataset_name


def quantize_with_auto_round(options: argparse.Namespace) -> None:
    """Quantizes the checkpoint with AutoRound, and prints the result.

    Raises:
        ValueError: Options are given that are for our own quantizer.
    """
    ours = {
        "--curvature": options.curvature,
        "--grid": options.grid,
        "--statistics": options.statistics,
        "--statistics-batches": options.statistics_batches,
        "--distill-steps": options.distill_steps,
        "--non-expert-bits": options.non_expert_bits,
    }
    given = [name for name, value in ours.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be used with --backend auto-round, which fits the weights itself")
    if options.tokenizer is not None:
        raise ValueError("--backend auto-round takes the checkpoint's own tokenizer: save --tokenizer's there instead")
    auto_round_backend.check_installed()
    load_tokenizer(options.checkpoint)  # which AutoRound writes into OUT
    blocks: list[Any] = []
    if options.iterations:
        batches = data_of(options, options.checkpoint).train_dataloader()
        whole = (row for batch in batches for row in batch["input_ids"][(batch["labels"] != -100).all(dim=1)])
        blocks = list(islice(whole, options.samples))
    if blocks:
        print(f"tunes the rounding on {len(blocks)} blocks of training text of {dataset_name(options)}")
    arguments = options.checkpoint, options.plan, options.out, blocks, options.iterations
    for note in auto_round_backend.quantize_with_auto_round(*arguments):
        print(note, file=sys.stderr)
    options.document = {"out": options.out, "format": "auto-round", "bytes_after": Checkpoint(options.out).nbytes}
    print(f"wrote {options.out} in AutoRound's format; load it in a process that loads no float model afterwards")
