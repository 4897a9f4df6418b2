"""Float32 copies of 16-bit weights, where a trainer keeps them: what is really trained.

A step at a small rate moves the copy and often not the rounded weight; the change of a norm of rounded weights is then
rounding more than training. DeepSpeed, Megatron and Transformer Engine's optimizers keep such copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..compat import held_by_deepspeed
from ..layers.moe_layers import MoELayer

_STATE_KEYS = ("master_param", "master_weight", "master")  # of a parameter's optimizer state


def read_masters(layers: Sequence[MoELayer], optimizers: Iterable[Any]) -> None:
    """Has the norms of 16-bit routers read from the float32 copies that are trained, where there are any.

    A copy that comes to be with the first step is looked for at each reading. Before it is there, it would be equal to
    the weight. One that does not round to the weight is not what the model has now (weight averaging, the best
    checkpoint loaded at the end), and the weight is read.

    Args:
        layers: As found by `find_moe_layers`; their routers remember where to look.
        optimizers: That train the model, in any wrappers.
    """
    inner = innermost(optimizers)  # whose states are other objects once a checkpoint has been loaded
    for layer in layers:
        weight = layer.router_is
        if weight.dtype in (torch.bfloat16, torch.float16) and not weight.is_adapted:
            weight.master = partial(_master, weight.parameter, inner)


def master_kind(layers: Sequence[MoELayer]) -> str:
    """Whose float32 copies the routers' norms are read from now; empty where the weights themselves are read."""
    for layer in layers:
        parameter = layer.router_is.parameter()
        if layer.router_is.master is None:
            continue
        if held_by_deepspeed(parameter):
            return "DeepSpeed's"
        if layer.router_is.master() is not None:
            return "Megatron's" if hasattr(parameter, "main_param") else "the optimizer's"
    return ""


class Masters:
    """The float32 copies of a run, and what is to be said of them.

    Args:
        layers: As found by `find_moe_layers`; see `read_masters`.
        optimizers: That train the model.
    """

    def __init__(self, layers: Sequence[MoELayer] = (), optimizers: Iterable[Any] = ()) -> None:
        read_masters(layers, optimizers)
        self._layers, self._owner = layers, ""

    def news(self) -> str:
        """A line where the norms that were just read come from other weights than those before; empty otherwise."""
        before, self._owner = self._owner, master_kind(self._layers)
        if self._owner == before:
            return ""
        return f"router norms are read from {self._owner or 'no'} float32 copies of the weights from here on"


def innermost(optimizers: Iterable[Any]) -> list[Any]:
    """The optimizers inside all wrappers: Lightning's, accelerate's, DeepSpeed's, Megatron's."""
    found = []
    for optimizer in optimizers:
        inner = optimizer
        while hasattr(inner, "optimizer") and inner.optimizer is not None:
            inner = inner.optimizer
        chained = getattr(inner, "chained_optimizers", None)
        found += innermost(chained) if chained else [inner]
    return [one for one in found if hasattr(one, "state")]


def _master(parameter_of: Callable[[], Tensor], optimizers: Sequence[Any]) -> Tensor | None:
    """The float32 copy of a parameter, of its shape; None if there is none, or if it is of other weights."""
    parameter = parameter_of()
    if held_by_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor | None = safe_get_full_fp32_param(parameter)
        if found is None or found.shape != parameter.shape:  # the parameter is a placeholder of ZeRO-3
            return found
        return found if _rounds_to(found, parameter) else None
    candidates = [getattr(parameter, "main_param", None)]
    states = [one.state[parameter] for one in optimizers if parameter in one.state]
    candidates += [state.get(key) for state in states for key in _STATE_KEYS]
    whole = [
        one
        for one in candidates
        if isinstance(one, Tensor) and one.dtype == torch.float32 and one.shape == parameter.shape
    ]
    return next((one for one in whole if _rounds_to(one, parameter)), None)


def _rounds_to(copy: Tensor, weight: Tensor) -> bool:
    same = (copy.detach().to(weight) == weight.detach()).all()
    return bool(same.full_tensor() if isinstance(same, DTensor) else same)
