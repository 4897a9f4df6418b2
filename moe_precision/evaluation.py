"""Judging a model on text: mean loss and perplexity, and the same on the rarest target tokens.

Average loss weighs frequent tokens most; what quantization does to rare ones shows only in the tail.
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


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a token.

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


@torch.inference_mode()
def token_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target token of a batch.

    Args:
        model: A causal or a sequence-to-sequence language model.
        batch: ``input_ids`` and ``labels`` ``(B, T)``; labels of -100 are left out. A causal model predicts the next
            label, so its first label has no loss.

    Returns:
        Losses ``(N,)`` float32 and their target tokens ``(N,)`` int64.
    """
    batch = {key: value.to(model.device) for key, value in batch.items()}
    labels = batch["labels"]  # (B, T)
    if model.config.is_encoder_decoder:
        logits = model(**batch).logits
    else:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
    kept = labels != -100
    targets = labels[kept]
    return F.cross_entropy(logits[kept].float(), targets, reduction="none"), targets


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
    model.eval()
    parts = [token_losses(model, batch) for batch in tqdm(batches, desc=name, unit="batch", leave=False)]
    losses, targets = (torch.cat([part[i].cpu() for part in parts]) for i in range(2))
    return summarize_losses(losses, targets, token_counts)
