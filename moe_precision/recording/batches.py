"""Runs a model on a batch of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..layers.module_tree import root_model


def run_batch(model: nn.Module, batch: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
    """The model's output on one batch, which is moved to the model's device.

    Args:
        model: The model, or what is around it.
        batch: Keyword arguments of its forward pass, as a mapping; anything else is the only argument.
        weights: Full parameter name -> what to use in its place.
    """
    device = next(model.parameters()).device
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {key: _to(value, device) for key, value in batch.items()}
        if isinstance(root_model(model), PreTrainedModel):
            kwargs["use_cache"] = False
    else:
        args = (_to(batch, device),)
    return model(*args, **kwargs) if weights is None else functional_call(model, dict(weights), args, kwargs)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
