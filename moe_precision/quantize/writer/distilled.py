"""Distills the scales of a packed checkpoint, with it and its float checkpoint in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import Checkpoint, load_model, opened
from ...checkpoints.folders import check_quantizing, folder_replaced_when_done
from ...checkpoints.headers import CheckpointError
from ...checkpoints.other_files import copy_other_files
from ..card import add_to_card
from ..distilling import RATE, STEPS, Distilled, Through, distill_scales
from ..hf import PlanHfQuantizer


def distill_checkpoint(
    checkpoint: Checkpoint | str | os.PathLike[str],
    packed: str | os.PathLike[str],
    out: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    through: Through = "layers",
    max_shard_size: int | str = "250MB",
) -> Distilled:
    """`distill_scales` of a packed checkpoint, written as a new one.

    Args:
        checkpoint: Folder of the float checkpoint.
        packed: Folder of what `quantize_checkpoint` made of it.
        out: Folder to write; it appears in one step, when it is complete.
        batches: As in `distill_scales`.
        steps: As in `distill_scales`.
        rate: As in `distill_scales`.
        through: As in `distill_scales`.
        max_shard_size: Largest file, in bytes or as ``"5GB"``.

    Raises:
        CheckpointError: A checkpoint is incomplete or damaged, or ``packed`` was not quantized here.
        DistillError: As in `distill_scales`.

    Example:
        >>> import torch
        >>> quantize_checkpoint("checkpoint", "precision_plan.json", "packed")
        >>> batches = [{"input_ids": torch.randint(0, 128, (4, 64))} for _ in range(4)]
        >>> print(distill_checkpoint("checkpoint", "packed", "distilled", batches, steps=5).described())
        error of the layers' output: ...
    """
    with opened(checkpoint) as source:
        check_quantizing(source, out, packed)
        student = load_model(packed)  # only its packed experts are used, and all of it is saved as it was
        quantizer = getattr(student, "hf_quantizer", None)
        if not isinstance(quantizer, PlanHfQuantizer):
            raise CheckpointError(f"{os.fspath(packed)!r} was not quantized by moe-precision: it has no packed experts")
        model = source.load(dtype=torch.float32)
    with folder_replaced_when_done(out) as folder:
        found = distill_scales(
            student, model, batches, steps=steps, rate=rate, through=through, **quantizer.plan.patterns
        )
        student.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_other_files(Path(packed), folder)
        line = f"Distilled: scales and offsets trained for {steps} steps, codes kept; {found.described()}."
        add_to_card(folder, line)
    return found
