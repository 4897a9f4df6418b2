"""Models that have been trained for a few steps, and losses to take gradients of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def trained_with(
    optimizer_class: Callable[..., Any], model: PreTrainedModel, steps: int = 3, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer that has trained a model for some steps on random tokens."""
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **settings)
    for step in range(steps):
        ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(step))
        extra = {} if not model.config.is_encoder_decoder else {"decoder_input_ids": ids}
        model(input_ids=ids, **extra).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return optimizer


def losses_of(model: PreTrainedModel, count: int) -> list[Callable[[], Tensor]]:
    """Losses of a causal language model on batches of random tokens, each computed when called."""

    def loss(seed: int) -> Tensor:
        rows = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(seed))
        return model(input_ids=rows, labels=rows).loss

    return [partial(loss, seed) for seed in range(count)]
