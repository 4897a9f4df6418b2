"""Losses by hand, the rare tail, and models that are judged by their own targets."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_precision.judging.evaluation import evaluate, summarize_losses, token_losses
from tests.support.models import build, logits


def test_mean_and_rarest_tenth():
    targets = torch.tensor([0] * 8 + [1, 2] + [0] * 10)  # 20 tokens: the rarest tenth is two of them
    losses = torch.arange(20.0)
    counts = torch.tensor([1000, 5, 7])
    result = summarize_losses(losses, targets, counts)
    assert result.loss == 9.5
    assert result.rare_loss == 8.5  # targets 1 and 2, at positions 8 and 9
    assert result.tokens == 20
    assert result.perplexity == pytest.approx(math.exp(9.5))
    with pytest.raises(ValueError, match="no target tokens"):
        summarize_losses(torch.empty(0), torch.empty(0, dtype=torch.long), counts)


def test_a_causal_model_predicts_the_next_token(mixtral):
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[1, 5:] = -100  # padding
    losses, targets, _ = token_losses(mixtral, {"input_ids": ids, "labels": labels})
    assert targets.tolist() == [*ids[0, 1:].tolist(), *ids[1, 1:5].tolist()]
    expected = F.cross_entropy(logits(mixtral)[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(losses[:8], expected)


def test_a_seq2seq_model_predicts_its_labels():
    model = build("switch_transformers")
    batch = {"input_ids": torch.randint(3, 128, (2, 7)), "labels": torch.randint(3, 128, (2, 5))}
    losses, targets, _ = token_losses(model, batch)
    assert targets.tolist() == batch["labels"].flatten().tolist()
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(losses.mean(), expected)


def test_evaluate_joins_batches(mixtral):
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 128, (3, 2, 9))]
    result = evaluate(mixtral, batches, torch.ones(128))
    assert result.tokens == 3 * 2 * 8
    every = torch.cat([token_losses(mixtral, batch)[0] for batch in batches])
    assert result.loss == pytest.approx(every.double().mean().item())
