"""Judging a model on text: mean loss and perplexity, overall and on the rarest target tokens.

Average loss gives frequent tokens the most weight; what quantization does to rare ones shows only in the tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

RARE_SHARE = 0.1  # the tail: this share of all target tokens, those seen least in training
FREQUENT_SHARE = 0.5  # the head: this share of them, those seen most; the rest is the middle
BANDS = ("frequent", "middle", "rare")


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token.

    Attributes:
        loss: Mean cross-entropy over all target tokens.
        rare_loss: Mean cross-entropy over the rarest tenth of the target tokens.
        tokens: Number of target tokens.
    """

    loss: float
    rare_loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)

    @property
    def rare_perplexity(self) -> float:
        """``exp(rare_loss)``."""
        return math.exp(self.rare_loss)


def target_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of every target token of a batch.

    Args:
        model: A causal or a sequence-to-sequence language model.
        batch: ``input_ids`` and ``labels`` ``(B, T)``; labels of -100 are left out. A causal model predicts the next
            label, so its first label has no logits.

    Returns:
        Logits ``(N, vocab)`` float32, their target tokens ``(N,)`` int64 and which labels they predict, ``(B, T)`` bool
        with ``N`` of them true.
    """
    batch = {key: value.to(model.device) for key, value in batch.items()}
    labels = batch["labels"]  # (B, T)
    kept = labels != -100
    if model.config.is_encoder_decoder:
        logits = model(**batch).logits[kept]
    else:
        kept[:, 0] = False
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1][kept[:, 1:]]
    return logits.float(), labels[kept], kept


def token_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every target token of a batch.

    Args:
        model: As in `target_logits`.
        batch: As in `target_logits`.

    Returns:
        Losses ``(N,)`` float32, their target tokens ``(N,)`` int64 and the rows they are in ``(N,)`` int64.
    """
    logits, targets, kept = target_logits(model, batch)
    return F.cross_entropy(logits, targets, reduction="none"), targets, kept.nonzero()[:, 0]


def summarize_losses(losses: Tensor, targets: Tensor, token_counts: Tensor) -> Evaluation:
    """Mean loss of all target tokens and of the rarest tenth.

    Args:
        losses: ``(N,)``.
        targets: ``(N,)`` int64.
        token_counts: ``(vocab,)``, how often each token occurs in training.
    """
    if len(losses) == 0:
        raise ValueError("no target tokens: every label is -100, or there is no batch")
    rarest = torch.argsort(token_counts[targets], stable=True)[: max(1, round(RARE_SHARE * len(targets)))]
    return Evaluation(losses.double().mean().item(), losses[rarest].double().mean().item(), len(losses))


def evaluate(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], token_counts: Tensor, name: str = "Evaluating"
) -> Evaluation:
    """Evaluates a model on batches as `token_losses` takes them, with a progress bar."""
    losses, targets, _ = document_losses(model, batches, name)
    return summarize_losses(losses, targets, token_counts)


def frequency_bands(targets: Tensor, token_counts: Tensor) -> Tensor:
    """Which of `BANDS` each target token is in, by how often it occurs in training.

    Args:
        targets: ``(N,)`` int64.
        token_counts: ``(vocab,)``.

    Returns:
        ``(N,)`` int64: 0 for the half of all targets that are most frequent, 2 for the rarest tenth, 1 between them.
    """
    order = torch.argsort(token_counts[targets], stable=True)  # rarest first, as in `summarize_losses`
    bands = torch.ones_like(targets)
    bands[order[: max(1, round(RARE_SHARE * len(targets)))]] = 2
    bands[order[len(targets) - round(FREQUENT_SHARE * len(targets)) :]] = 0
    return bands


def document_losses(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], name: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every target token of all batches, and the document, a row of a batch, that each is in.

    Args:
        model: As in `token_losses`; put into evaluation mode.
        batches: As in `token_losses`.
        name: Label of the progress bar; None for no bar.

    Returns:
        Losses ``(N,)`` float32, targets ``(N,)`` int64 and documents ``(N,)`` int64, on the CPU.
    """
    model.eval()
    parts, documents = [], 0
    for batch in tqdm(batches, desc=name, unit="batch", leave=False, disable=name is None):
        with torch.inference_mode():
            losses, targets, rows = token_losses(model, batch)
        parts.append((losses.cpu(), targets.cpu(), rows.cpu() + documents))
        documents += len(batch["labels"])
    if not parts:
        raise ValueError("no batch to judge on")
    losses, targets, rows = (torch.cat([part[i] for part in parts]) for i in range(3))
    return losses, targets, rows
