"""What an optimizer will keep of the experts' gradients, found out before training by a step on a small layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers.moe_layers import MoELayer, find_moe_layers
from .curvature import CurvatureError
from .second_moments import curvature_of

_WIDTH, _EXPERTS = 64, 2


def check_second_moments(layers: list[MoELayer], optimizers: Iterable[Any]) -> None:
    """Raises `CurvatureError` if the optimizers that train the experts can keep no second moment of their weights.

    An optimizer that cannot be made anew, or that trains no expert yet, is given the benefit of the doubt.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Lightning's or accelerate's wrappers are looked through.
    """
    weights = [weight for layer in layers for bank in layer.banks.values() for weight in bank.weights]
    for weight in weights:
        if weight.gathers or weight.is_adapted:
            what = "in flat shards (FSDP1, DeepSpeed)" if weight.gathers else "behind an adapter"
            raise CurvatureError(
                f"{weight.name!r} is {what}: the optimizer keeps no second moment of the whole weight. Let "
                "curvature_batches=64 take squared gradients after the last step"
            )
    experts = {id(weight.parameter()) for weight in weights}
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            if any(id(parameter) in experts for parameter in group["params"]):
                _check_group(inner, group)


def _check_group(optimizer: Any, group: dict[str, Any]) -> None:
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    with torch.random.fork_rng(devices=[]):
        model = _SmallLayer()
        layers = find_moe_layers(model)
        try:
            trial = type(optimizer)([{**settings, "params": list(model.experts.parameters())}])
            for parameter in model.experts.parameters():
                parameter.grad = torch.ones_like(parameter)
            trial.step()
        except Exception:  # whatever an optimizer asks for; the end of training will tell
            return
    try:
        curvature_of(layers, [trial])
    except CurvatureError as error:
        raise CurvatureError(
            f"{type(optimizer).__name__} keeps no second moment of the experts' gradients that can be read. Train them "
            "with Adam, AdamW or Adafactor, or let curvature_batches=64 take squared gradients after the last step"
        ) from error


class _SmallLayer(nn.Module):
    """Two experts and their router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(_WIDTH, _EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(_WIDTH, _WIDTH, bias=False), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH, bias=False))
            for _ in range(_EXPERTS)
        )
