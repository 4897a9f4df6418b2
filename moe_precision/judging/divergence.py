"""How far a quantized model's predictions are from the float model's: KL divergence, top-1 agreement, same experts.

On a few thousand tokens, differences of the loss are mostly noise. KL to the float model has hardly any: it is 0 where
nothing has changed, and every change of a prediction adds to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .choices import Choices, Place, containers, counted, places_of, unchanged, watched
from .evaluation import target_logits

_CHUNK = 2**20  # logits at a time


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the float model that it was made of.

    Attributes:
        kl: Mean of KL(float || model) over target tokens, in nats.
        kl_99: Its 99th percentile over tokens, and `kl_999` its 99.9th.
        top1: Share of the target tokens for which both models find the same token most likely.
        same_experts: Share of tokens that go to the same experts in every layer. In an encoder-decoder model, tokens of
            the encoder's input count too. None if a layer's experts are not called with the chosen indices.
        tokens: Target tokens that `kl` and `top1` rest on.
        every: Only each ``every``-th target token is among them; 1 means all.
    """

    kl: float
    kl_99: float
    kl_999: float
    top1: float
    same_experts: float | None
    tokens: int
    every: int = 1

    @classmethod
    def of(cls, kl: Tensor, agrees: Tensor, same: Tensor | None, every: int = 1) -> Divergence:
        """Summarizes tokens.

        Args:
            kl: ``(N,)`` float64.
            agrees: Whether the most likely token is the same, ``(N,)`` bool.
            same: As `unchanged` returns it.
            every: What share of the target tokens these are.
        """
        kl_99, kl_999 = np.quantile(kl.numpy(), (0.99, 0.999)).tolist()
        experts = None if same is None else float(same.double().mean())
        return cls(float(kl.mean()), kl_99, kl_999, float(agrees.double().mean()), experts, len(kl), every)

    @classmethod
    def mean_of(cls, several: Sequence[Divergence]) -> Divergence:
        """The mean of each figure over models that were judged on the same tokens."""

        def mean(name: str) -> float:
            return float(np.mean([getattr(one, name) for one in several]))

        experts = None if any(one.same_experts is None for one in several) else mean("same_experts")
        first = several[0]
        return cls(mean("kl"), mean("kl_99"), mean("kl_999"), mean("top1"), experts, first.tokens, first.every)


@dataclass(frozen=True)
class Measured:
    """A model beside its float model on the same batches; tensors are on the CPU.

    Attributes:
        losses: Cross-entropy of every target token, ``(N,)`` float32.
        float_losses: The float model's, ``(N,)`` float32.
        targets: ``(N,)`` int64.
        documents: The row that each is in, counted over all batches, ``(N,)`` int64.
        divergence: How far the two are apart.
    """

    losses: Tensor
    float_losses: Tensor
    targets: Tensor
    documents: Tensor
    divergence: Divergence


@dataclass(frozen=True)
class Observation:
    """What a model says on one batch of ``N`` target tokens.

    Attributes:
        log_probs: ``(N, vocab)`` float32, on the model's device.
        losses: ``(N,)`` float32, on the CPU like all that follows.
        targets: ``(N,)`` int64.
        rows: ``(N,)`` int64.
        experts: Where the tokens that count were sent.
    """

    log_probs: Tensor
    losses: Tensor
    targets: Tensor
    rows: Tensor
    experts: Choices


def token_divergence(reference: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || model) of every token, and whether both find the same token most likely.

    Args:
        reference: Log-probabilities of the float model, ``(N, vocab)`` float32.
        log_probs: Log-probabilities of the other model, the same shape.

    Returns:
        ``(N,)`` float64 in nats, summed in float64, and ``(N,)`` bool; both on the CPU.

    Raises:
        ValueError: The vocabularies differ.
    """
    if reference.shape != log_probs.shape:
        raise ValueError(
            f"the float model predicts {tuple(reference.shape)} (tokens, vocabulary), the other model "
            f"{tuple(log_probs.shape)}: give a model of the same vocabulary"
        )
    precise = torch.float32 if log_probs.device.type == "mps" else torch.float64
    kl, agrees = [], []
    rows = max(1, _CHUNK // log_probs.shape[1])
    for p, q in zip(reference.split(rows), log_probs.split(rows), strict=True):
        p = p.to(q.device)
        kl.append((p.exp() * (p - q)).sum(dim=-1, dtype=precise).cpu().double())
        agrees.append((p.argmax(dim=-1) == q.argmax(dim=-1)).cpu())
    return torch.cat(kl), torch.cat(agrees)


def observations(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], places: Sequence[Place]
) -> Iterator[Observation]:
    """Runs a model, which is put into evaluation mode, on one batch after the other.

    Args:
        model: A float or quantized model.
        batches: As in `target_logits`.
        places: Of the float model's experts.
    """
    model.eval()
    modules = containers(model, places)
    for batch in batches:
        with torch.inference_mode():
            with watched(modules) as choices:
                logits, targets, kept = target_logits(model, batch)
            log_probs = logits.log_softmax(dim=-1)
            losses = F.nll_loss(log_probs, targets, reduction="none")
            tokens = _tokens_that_count(batch, kept, model.config.is_encoder_decoder)
            experts = counted(places, choices, tokens)
        yield Observation(log_probs, losses.cpu(), targets.cpu(), kept.nonzero()[:, 0].cpu(), experts)


def _tokens_that_count(batch: dict[str, Tensor], kept: Tensor, encoder: bool) -> dict[bool, Tensor]:
    """Of the encoder's tokens (True) those that are no padding, of the others (False) those that a target follows."""
    if not encoder:  # the token before each target is the one that is sent to experts
        return {False: torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1).flatten()}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return {False: kept.flatten(), True: mask.to(kept.device).bool().flatten()}


def measure_against(
    seen: Iterable[Observation],
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    places: Sequence[Place],
    every: int = 1,
    name: str | None = None,
) -> Measured:
    """Measures a model against what the float model says.

    Args:
        seen: The float model's observations, batch by batch, with log-probabilities of every ``every``-th target.
        model: The other model.
        batches: The batches that ``seen`` is of.
        places: Of the float model's experts.
        every: 1 where ``seen`` has all targets.
        name: What the progress bar says; None for no bar.

    Raises:
        ValueError: There is no target token, or the vocabularies differ.
    """
    pairs, kls, agreeing, sames = [], [], [], []
    start = documents = 0
    bar = tqdm(batches, desc=name, unit="batch", leave=False, disable=name is None)
    for batch, mine, theirs in zip(batches, observations(model, bar, places), seen, strict=True):
        kl, agrees = token_divergence(theirs.log_probs, mine.log_probs[-start % every :: every])
        kls.append(kl)
        agreeing.append(agrees)
        sames.append(unchanged(places, theirs.experts, mine.experts))
        pairs.append((mine.losses, theirs.losses, mine.targets, mine.rows + documents))
        start += len(mine.losses)
        documents += len(batch["labels"])
    if start == 0:
        raise ValueError("no target tokens: every label is -100, or there is no batch")
    same = [one for one in sames if one is not None]
    found = Divergence.of(
        torch.cat(kls), torch.cat(agreeing), torch.cat(same) if len(same) == len(sames) else None, every
    )
    losses, float_losses, targets, rows = (torch.cat(column) for column in zip(*pairs, strict=True))
    return Measured(losses, float_losses, targets, rows, found)


def measure(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    name: str | None = None,
) -> Measured:
    """Runs a float model and another one beside each other, batch by batch; nothing is kept, all tokens count.

    Args:
        reference: The float model; put into evaluation mode.
        model: The other model, with the same vocabulary; put into evaluation mode.
        batches: As in `target_logits`.
        name: What the progress bar says; None for no bar.

    Raises:
        ValueError: There is no target token, or the vocabularies differ.
    """
    batches, places = list(batches), places_of(reference)
    return measure_against(observations(reference, batches, places), model, batches, places, name=name)


def divergence(
    reference: PreTrainedModel, model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], name: str | None = None
) -> Divergence:
    """How far a model is from a float model; see `measure`.

    Example:
        >>> found = divergence(model, quantized, batches)
        >>> found.kl, found.top1
        (0.0021, 0.978)
    """
    return measure(reference, model, batches, name).divergence
