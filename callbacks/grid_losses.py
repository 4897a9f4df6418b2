"""Losses of validation batches on the grid and off it, while a model is trained on a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_precision.annealing.hooks import GridHooks
from moe_precision.layers.module_tree import root_model
from moe_precision.recording.loads import not_counted


class GridLosses:
    """Sums over a validation run.

    Attributes:
        sums: ``(3,)`` float64: tokens, and the summed loss on the grid and off it; None before the first batch.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Any, hooks: GridHooks | None) -> None:
        """Adds a batch, if it holds the arguments of a transformers model, labels included."""
        model = root_model(model)
        known = isinstance(model, PreTrainedModel) and isinstance(batch, Mapping) and "labels" in batch
        if hooks is None or not known:
            return
        labels = batch["labels"]
        if not model.config.is_encoder_decoder:  # type: ignore[union-attr]
            labels = labels[..., 1:]  # each token is predicted by those before it
        tokens = (labels != -100).sum().double()
        if tokens == 0:
            return
        with not_counted():
            on = model(**batch).loss.double()
            with hooks.lifted():
                off = model(**batch).loss.double()
        sums = tokens * torch.stack([torch.ones_like(tokens), on, off])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, sums: Tensor | None) -> dict[str, float]:
        """The mean losses of the run, from the sums of all ranks; empty if there was no batch."""
        self.sums = None
        if sums is None:
            return {}
        tokens, on, off = sums.tolist()
        return {"anneal/val_loss": on / tokens, "anneal/val_loss_float": off / tokens}
