"""Which experts the tokens go to: forward hooks on the experts of a model that count tokens and sum routing weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..compat import forget_compiled_code, in_backward_pass
from ..layers.moe_layers import MoELayer, find_moe_layers
from .batches import run_batch
from .processes import processes_per_batch, summed
from .signals import expert_load

Loads = dict[str, Tensor]  # layer -> (2, E) float64: tokens, summed routing weight (NaN where it cannot be seen)


class LoadCounter:
    """Counts what every expert receives, separately in training and in validation, until it is closed.

    Which of the two runs is for the caller to say, who knows the state of the trainer. The mode of a module does not
    tell: Lightning trains a model from `from_pretrained` in evaluation mode, and a rollout is generated in that mode in
    the middle of a training step.

    Experts that are called with the chosen indices and their weights, as in transformers, give both. Separate modules
    in a plain list give only the number of tokens. A layer that gives neither is left out of the counts. Padding counts
    as the router counts it. A forward pass that is repeated in the backward pass (gradient checkpointing) is counted
    once, and one inside `not_counted` not at all.

    Args:
        layers: As found by `find_moe_layers`. The hooks are on their modules, under every wrapper.
        model: The whole model, which shows whether several processes run each batch together (tensor parallelism):
            their tokens count once.

    Attributes:
        training: Whether what runs now is training.
        unseen: Names of the layers that were called in a way that shows nothing.
    """

    def __init__(self, layers: list[MoELayer], model: nn.Module) -> None:
        self.training, self.unseen = True, set[str]()
        self._layers = layers
        self._together = processes_per_batch(model)
        self._counts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}  # training -> layer -> (2, E)
        self._handles: list[Any] = []
        for layer in layers:
            container = layer.container()
            if layer.layout == "modules" and type(container).forward is nn.Module.forward:  # a plain list
                for expert, module in enumerate(layer.expert_modules(), start=layer.first_expert):
                    self._hook(module, self._one_expert, layer, expert)
            else:
                self._hook(container, self.count, layer)
        forget_compiled_code()  # that was compiled in a validation before training

    def _hook(self, module: nn.Module, count: Any, *known: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(_Hook(count, known), with_kwargs=True))

    @torch.no_grad()
    def count(self, given: tuple[Any, ...], layer: MoELayer) -> None:
        """Counts one call of all experts of a layer, from their arguments."""
        found = routing(given, layer.num_experts)
        if found is None:
            self.unseen.add(layer.name)
        else:
            self._add(layer, expert_load(*found, layer.num_experts))

    @torch.no_grad()
    def _one_expert(self, given: tuple[Any, ...], layer: MoELayer, expert: int) -> None:
        tokens = next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)
        if tokens is not None:
            load = torch.zeros(2, layer.num_experts, dtype=torch.float32, device=tokens.device)
            load[0, expert], load[1] = tokens.shape[:-1].numel(), torch.nan
            self._add(layer, load)

    def _add(self, layer: MoELayer, load: Tensor) -> None:
        counts = self._counts[self.training]
        precise = load if load.device.type == "mps" else load.double()
        counts[layer.name] = counts[layer.name] + precise if layer.name in counts else precise

    def take(self, training: bool) -> Loads:
        """What was counted since the last call, summed over all processes; a collective: call it on all ranks."""
        counted, self._counts[training] = self._counts[training], {}
        device = next(iter(counted.values())).device if counted else self._layers[0].router_is.parameter().device
        # layers that were not called have no tokens, and no weight either
        flat = [
            counted.get(layer.name, torch.zeros(2, layer.num_experts, dtype=torch.float32)).to(device)
            for layer in self._layers
        ]
        together = torch.cat([one.double() if device.type != "mps" else one for one in flat], dim=1)
        together = summed(together) / self._together
        sizes = [layer.num_experts for layer in self._layers]
        by_layer = zip(self._layers, together.cpu().double().split(sizes, dim=1), strict=True)
        return {layer.name: load.clone() for layer, load in by_layer if load[0].sum() > 0}

    def forget_validation(self) -> None:
        """Drops what was counted outside of training since the last call of `take`."""
        self._counts[False] = {}

    def close(self) -> None:
        """Removes the hooks; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Hook:
    """A forward hook that counts; in copies and pickles of the model it does nothing."""

    def __init__(self, count: Any, known: tuple[Any, ...]) -> None:
        self._count, self._known = count, known

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if _not_counted:
            return
        if torch.compiler.is_compiling() or not in_backward_pass():
            self._count((*args, *kwargs.values()), *self._known)

    def __reduce__(self) -> Any:
        return NoHook, ()


_not_counted: list[bool] = []


@contextmanager
def not_counted() -> Iterator[None]:
    """Forward passes inside are not part of the run and are not counted."""
    _not_counted.append(True)
    try:
        yield
    finally:
        _not_counted.pop()


def uncounted_depth() -> int:
    """How many `not_counted` this code is inside of."""
    return len(_not_counted)


class NoHook:
    """What our hooks become in copies and pickles of a model: it does nothing."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pass


def count_loads(model: nn.Module, batches: Iterable[dict[str, Tensor]], **patterns: Any) -> Loads:
    """What every expert receives on some batches, without training.

    Args:
        model: A transformers model; it is put into evaluation mode.
        batches: Keyword arguments of its forward pass.
        patterns: ``router_pattern`` and ``expert_pattern``, as in `find_moe_layers`.
    """
    model.eval()
    counter = LoadCounter(find_moe_layers(model, **patterns), model)
    counter.training = False
    try:
        with torch.inference_mode():
            for batch in tqdm(batches, desc="expert load", unit="batch", leave=False):
                run_batch(model, batch)
        return counter.take(training=False)
    finally:
        counter.close()


def routing(given: tuple[Any, ...], num_experts: int) -> tuple[Tensor, Tensor | None] | None:
    """The routing in a call of all experts of a layer.

    Args:
        given: Positional and keyword arguments of the call.
        num_experts: Number of experts of the layer.

    Returns:
        Chosen indices ``(N, K)`` (``num_experts`` for none) and, if there, their weights of the same shape. None where
        no argument is certain to be that: counts per expert, a padding mask or positions are not.
    """
    tensors = [x for x in given if isinstance(x, Tensor)]
    hidden = next((x for x in tensors if x.is_floating_point() and x.ndim >= 2), None)  # (..., d)
    if hidden is None:
        return None
    tokens = hidden.shape[:-1].numel()
    for chosen in tensors:
        if chosen.is_floating_point() or chosen.ndim < 2 or chosen.shape[0] != tokens:
            continue
        if chosen.ndim == 3 and chosen.shape[-1] == num_experts:  # a mask (N, K, E); a full expert drops tokens
            index = torch.where(chosen.any(-1), chosen.to(torch.uint8).argmax(-1), num_experts)
        elif chosen.shape == (tokens, num_experts) and chosen.dtype == torch.bool:  # a mask (N, E)
            index = torch.where(chosen, torch.arange(num_experts, device=chosen.device), num_experts)
        elif chosen.ndim == 2 and chosen.shape[1] < num_experts and chosen.dtype != torch.bool:
            index = chosen
        else:
            continue
        weights = [x for x in tensors if x.is_floating_point() and x.shape == index.shape]
        return index, weights[-1] if weights else None
    return None
