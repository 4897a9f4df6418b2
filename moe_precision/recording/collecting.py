"""Collects expert statistics: forward hooks that sum the second moments of what every expert matrix is given.

Fused experts show their tokens in the arguments of transformers' experts interface; the input of their last matrix is
computed from the first one. Experts that are modules show the input of each of their ``nn.Linear`` layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..compat import apply_gate, runs_through_experts_interface
from ..layers.module_tree import modes_kept, root_model
from ..layers.moe_layers import MoELayer, find_moe_layers
from .loads import not_counted, routing
from .statistics import ExpertStatistics, StatisticsError

_OUTSIDE = -1  # index of an expert that is not chosen, or of a token that is padding


def collect_statistics(
    model: nn.Module, batches: Iterable[Any], *, text: str = "", **patterns: Any
) -> ExpertStatistics:
    """Second moments of the inputs of all expert matrices on some text, without gradients, in evaluation mode.

    Every token counts that the router sends to an expert, with the square of its routing weight. Where an expert is
    called without its routing weight being seen, the weight counts as 1. Padding does not count where a batch marks it
    by an ``attention_mask`` of 0 and the experts are given all tokens of the batch; else it counts as the router
    counts it.

    Args:
        model: The float model, whole on this process; it is left as it was.
        batches: Keyword arguments of its forward pass, each a mapping; anything else is the only argument.
        text: What the text is, for the file.
        patterns: ``router_pattern`` and ``expert_pattern``, as in `find_moe_layers`.

    Raises:
        StatisticsError: The experts of a layer are called in a way that no hook sees, no token reaches them, or
            several processes run.

    Example:
        >>> import torch
        >>> statistics = collect_statistics(model, [{"input_ids": torch.arange(3, 100)[None]}])
        >>> plan = allocate(model, method="uniform", average_bits=2, group_size=64)
        >>> packed = quantize_model(model, plan, statistics=statistics)
    """
    root, device = root_model(model), next(model.parameters()).device
    extra = {"use_cache": False} if isinstance(root, PreTrainedModel) else {}

    def forward(batch: Any) -> None:
        if isinstance(batch, Mapping):
            model(**{key: _to(value, device) for key, value in batch.items()}, **extra)
        else:
            model(_to(batch, device))

    steps = (partial(forward, batch) for batch in batches)
    return collect_from_steps(model, find_moe_layers(model, **patterns), steps, text=text)


def collect_from_steps(
    model: nn.Module, layers: list[MoELayer], steps: Iterable[Any], *, text: str = ""
) -> ExpertStatistics:
    """`collect_statistics` of forward passes that the caller runs: each step is called once, without gradients."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise StatisticsError(f"statistics are collected on one process, {dist.get_world_size()} are running")
    collector = Collector(model, layers)
    try:
        with modes_kept(model), torch.no_grad(), not_counted():
            model.eval()
            for step in tqdm(steps, desc="expert statistics", unit="batch", leave=False, disable=None):
                step()
        return collector.statistics(text)
    finally:
        collector.close()


def memory_bytes(layers: list[MoELayer]) -> int:
    """Bytes of all second moments while they are collected."""
    return sum(4 * layer.num_experts * inp * inp for layer in layers for _, inp in layer.projections.values())


class Collector:
    """Sums ``w**2 x x^T`` over the tokens of every expert until it is closed, float32 on the experts' device.

    Args:
        model: The model, whose ``attention_mask`` is looked at.
        layers: Of the model, as found by `find_moe_layers`.

    Raises:
        StatisticsError: Experts in a layout whose inputs cannot be seen.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer]) -> None:
        self._layers = layers
        self._sums: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
        self._rows = {layer.name: {name: [0] * layer.num_experts for name in layer.banks} for layer in layers}
        self._masks: dict[str, Tensor | None] = {}  # of the batch: its keyword -> (tokens,) bool
        self._called: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}  # layer -> hidden, index, weights
        self._of_rows: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # layer, expert -> weights of its rows, kept
        self._handles: list[Any] = []
        try:
            self._on(root_model(model), self._see_batch)
            for layer in layers:
                self._watch(layer)
        except BaseException:
            self.close()
            raise

    def _on(self, module: nn.Module, function: Any, *known: Any) -> None:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            function(*known, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch(self, layer: MoELayer) -> None:
        container = layer.container()
        if layer.fused and runs_through_experts_interface(container):
            self._on(container, self._fused, layer)
            return
        owners = [weight.module for bank in layer.banks.values() for weight in bank.weights]
        if layer.layout != "modules" or not all(isinstance(owner, nn.Linear) for owner in owners):
            raise StatisticsError(
                f"layer {layer.name!r}: the inputs of its experts ({type(container).__name__}, {layer.layout}) cannot "
                "be seen: expected transformers' experts interface, or nn.Linear layers in a module per expert"
            )
        if type(container).forward is not nn.Module.forward:  # else a plain list, which is not called
            self._on(container, self._call, layer)
        for expert, module in enumerate(layer.expert_modules()):
            self._on(module, self._expert, layer, expert)
            for name, bank in layer.banks.items():
                self._on(bank.weights[expert].module, self._linear, layer, name, expert)

    def _see_batch(self, args: Any, kwargs: dict[str, Any]) -> None:
        given = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
        self._masks = {
            name: mask.flatten() != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
            for name, mask in given.items()
        }

    def _without_padding(self, layer: MoELayer, index: Tensor) -> Tensor:
        """Expert indices ``(N, K)``, those of padding replaced, where a mask of the batch is for these tokens."""
        decoder = "decoder" in layer.name.split(".")
        mask = self._masks.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None or len(mask) != len(index):
            return index
        return torch.where(mask.to(index.device).unsqueeze(1), index, _OUTSIDE)

    def _fused(self, layer: MoELayer, args: Any, kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())  # what transformers' experts interface passes
        hidden, index, weights = given[:3]
        hidden, container = hidden.reshape(-1, hidden.shape[-1]), layer.container()
        index = self._without_padding(layer, index.reshape(len(hidden), -1))
        weights = weights.reshape(index.shape)
        gated = bool(container.has_gate)
        first, last = "gate_up_proj" if gated else "up_proj", "down_proj"
        for expert, matrix in enumerate(layer.banks[first].matrices()):
            token, place = torch.where(index == expert)
            if not len(token):
                continue
            x = hidden[token]
            bias = getattr(container, f"{first}_bias")[expert] if container.has_bias else None
            inner = F.linear(x, matrix.to(x.dtype), bias)
            inner = apply_gate(container, inner) if gated else container.act_fn(inner)  # type: ignore[operator]
            self._add(layer, first, expert, x, weights[token, place])
            self._add(layer, last, expert, inner, weights[token, place])

    def _call(self, layer: MoELayer, args: Any, kwargs: dict[str, Any]) -> None:
        """A container of modules is called: keeps the routing that it is given, if it is."""
        given = (*args, *kwargs.values())
        found = routing(given, layer.num_experts)
        self._called.pop(layer.name, None)
        if found is not None:
            hidden = next(x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2)
            self._called[layer.name] = hidden.reshape(-1, hidden.shape[-1]), *found

    def _expert(self, layer: MoELayer, expert: int, args: Any, kwargs: dict[str, Any]) -> None:
        """An expert is called: its rows are known to be some of the container's only if they are equal to them."""
        self._of_rows.pop((layer.name, expert), None)
        if layer.name not in self._called:
            return
        hidden, index, weights = self._called[layer.name]
        rows = _rows_of((*args, *kwargs.values()))
        token, place = torch.where(index == expert)
        token, place = token[place.argsort(stable=True)], place.sort().values  # as experts' own loops have them
        if rows is None or rows.shape != hidden[token].shape or not torch.equal(rows, hidden[token]):
            return
        of_rows = torch.ones(len(rows), device=rows.device) if weights is None else weights[token, place]
        kept = self._without_padding(layer, index)[token, place] == expert
        self._of_rows[layer.name, expert] = of_rows, kept

    def _linear(self, layer: MoELayer, projection: str, expert: int, args: Any, kwargs: dict[str, Any]) -> None:
        x = _rows_of((*args, *kwargs.values()))
        if x is None:
            return
        weights, kept = self._of_rows.get((layer.name, expert), (None, None))
        if weights is None or kept is None or len(weights) != len(x):
            self._add(layer, projection, expert, x, torch.ones(len(x), device=x.device))
        else:
            self._add(layer, projection, expert, x[kept], weights[kept])

    def _add(self, layer: MoELayer, projection: str, expert: int, x: Tensor, weights: Tensor) -> None:
        """Adds rows ``(n, in)`` with their weights ``(n,)``."""
        sums, width = self._sums[layer.name], layer.projections[projection][1]
        if projection not in sums:
            sums[projection] = torch.zeros(layer.num_experts, width, width, device=x.device)
        x = x.detach().float() * weights.detach().float().unsqueeze(1)
        sums[projection][expert].addmm_(x.T, x)
        self._rows[layer.name][projection][expert] += len(x)

    def statistics(self, text: str = "") -> ExpertStatistics:
        """What was collected; the sums are gone afterwards.

        Raises:
            StatisticsError: No token has reached a matrix of any expert of a layer, or a value is not finite.
        """
        found, self._sums = self._sums, {}
        for layer in self._layers:
            unseen = [name for name, rows in self._rows[layer.name].items() if not any(rows)]
            if unseen:
                raise StatisticsError(
                    f"layer {layer.name!r}: no input of {unseen} was seen. Was there no batch, or are these experts "
                    "called in a way that no hook sees (compiled, or through their parameters)?"
                )
            for name, sums in found[layer.name].items():
                rows = torch.tensor(self._rows[layer.name][name], device=sums.device)
                sums.div_(rows.clamp(min=1).view(-1, 1, 1))
        tokens = {layer.name: torch.tensor(self._rows[layer.name][layer.first]) for layer in self._layers}
        return ExpertStatistics.of(self._layers, found, tokens, text)

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _rows_of(given: tuple[Any, ...]) -> Tensor | None:
    """The activations among what a module is called with, ``(rows, in)``."""
    found = next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)
    return None if found is None else found.reshape(-1, found.shape[-1])


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
