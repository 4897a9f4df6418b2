"""Losses of validation batches on the grid and off it, while a model is trained on a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_precision.annealing.hooks import GridHooks
from moe_precision.annealing.soft_labels import divergence_less_cross_entropy, next_tokens
from moe_precision.annealing.teacher import Teacher
from moe_precision.layers.module_tree import root_model
from moe_precision.recording.loads import not_counted

_NAMES = ("anneal/val_loss", "anneal/val_loss_float", "anneal/val_kl")


class GridLosses:
    """Sums over a validation run.

    Attributes:
        sums: ``(3,)`` float64: tokens, and the summed loss on the grid and off it; with a teacher ``(4,)``, the summed
            KL(teacher || model on the grid) being the last; None before the first batch.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Any, hooks: GridHooks | None, teacher: Teacher | None = None) -> None:
        """Adds a batch, if it holds the arguments of a transformers model, labels included."""
        model = root_model(model)
        known = isinstance(model, PreTrainedModel) and isinstance(batch, Mapping) and "labels" in batch
        if hooks is None or not known:
            return
        tokens = (next_tokens(model, batch) != -100).sum().double()
        if tokens == 0:
            return
        with not_counted():
            output = model(**batch)
            found = [torch.ones_like(tokens), output.loss.double()]
            with hooks.lifted():
                found.append(model(**batch).loss.double())
            if teacher is not None:
                found.append(_divergence(model, batch, output.logits, teacher))
        sums = tokens * torch.stack(found)
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, sums: Tensor | None) -> dict[str, float]:
        """The mean losses of the run, from the sums of all ranks; empty if there was no batch."""
        self.sums = None
        if sums is None:
            return {}
        tokens, *found = sums.tolist()
        return {name: total / tokens for name, total in zip(_NAMES, found, strict=False)}  # the last with a teacher


def _divergence(model: nn.Module, batch: Mapping[str, Any], logits: Tensor, teacher: Teacher) -> Tensor:
    """Mean KL(teacher || model) over the tokens that have labels, ``()`` float64."""
    with teacher.in_charge():
        taught = model(**batch).logits.flatten(0, -2)
    logits, labels = logits.flatten(0, -2), next_tokens(model, batch).flatten().to(logits.device)
    change = divergence_less_cross_entropy(logits, taught, labels).double().sum() / (labels != -100).sum()
    return change + F.cross_entropy(logits.float(), labels).double()
