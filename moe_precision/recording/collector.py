"""Forward hooks that sum the second moments of what every expert matrix of some layers is given.

Fused experts show their tokens in the arguments of transformers' experts interface; the input of their last matrix is
computed from the first one. Experts that are modules show the input of each of their ``nn.Linear`` layers. The hooks
change nothing in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compat import apply_gate, in_backward_pass, runs_through_experts_interface
from ..layers.module_tree import root_model
from ..layers.moe_layers import MoELayer
from .loads import NoHook, routing, uncounted_depth
from .padding import Padding
from .processes import processes_per_batch, summed
from .statistics import ExpertStatistics, StatisticsError

_OUTSIDE = -1  # index of an expert that is not chosen, or of a token that is padding


def check_visible(layers: list[MoELayer]) -> None:
    """Raises `StatisticsError` for experts whose inputs no hook can see; without any forward pass."""
    for layer in layers:
        container = layer.container()
        weights = [weight for bank in layer.banks.values() for weight in bank.weights]
        if layer.fused and layer.parts > 1:
            raise StatisticsError(
                f"layer {layer.name!r}: its fused experts are split over processes, where each sees the tokens of its "
                "own: statistics take one module per expert, or a checkpoint"
            )
        if layer.fused and runs_through_experts_interface(container):
            if any(weight.gathers for weight in weights):
                raise StatisticsError(
                    f"layer {layer.name!r}: its experts are sharded by FSDP1 or DeepSpeed ZeRO-3, where a hook cannot "
                    "read them: train with DDP or FSDP2, or collect statistics from the checkpoint afterwards"
                )
        elif layer.layout != "modules" or not all(isinstance(weight.module, nn.Linear) for weight in weights):
            raise StatisticsError(
                f"layer {layer.name!r}: the inputs of its experts ({type(container).__name__}, {layer.layout}) cannot "
                "be seen: expected transformers' experts interface, or nn.Linear layers in a module per expert"
            )


class Collector:
    """Sums ``w**2 x x^T`` over the tokens of every expert until it is closed, float32 on the experts' device.

    A forward pass that gradient checkpointing repeats in the backward pass is not counted again. One inside of
    `not_counted` counts only if the collector was made inside of it too.

    Args:
        model: The model, whose ``attention_mask`` is looked at.
        layers: Of the model, as found by `find_moe_layers`; those whose sums are to be in memory.
        raises: Whether a hook's error is raised in the forward pass; else it is kept in `error`, and nothing more is
            summed.

    Attributes:
        active: Whether forward passes count now.
        error: Why a hook failed.

    Raises:
        StatisticsError: Experts in a layout whose inputs cannot be seen.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer], *, raises: bool = True) -> None:
        check_visible(layers)
        self.active, self.raises, self.depth = True, raises, uncounted_depth()
        self.error: Exception | None = None
        self._layers, self._together = layers, processes_per_batch(model)
        self._sums: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
        self._rows = {layer.name: {name: [0] * layer.num_experts for name in layer.banks} for layer in layers}
        self._padding = Padding()
        self._called: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}  # layer -> hidden, index, weights
        self._of_rows: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # layer, expert -> weights of its rows, kept
        self._handles: list[Any] = []
        self._on(root_model(model), self._see_batch)
        for layer in layers:
            self._watch(layer)

    @property
    def rows(self) -> int:
        """Rows that the first matrix of all experts was given so far on this process, of the layer with the fewest."""
        return min(sum(self._rows[layer.name][layer.first]) for layer in self._layers)

    def _on(self, module: nn.Module, function: Any, *known: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(_Hook(self, function, known), with_kwargs=True))

    def _watch(self, layer: MoELayer) -> None:
        container = layer.container()
        if layer.fused:
            self._on(container, self._fused, layer)
            return
        if type(container).forward is not nn.Module.forward:  # else a plain list, which is not called
            self._on(container, self._call, layer)
        for place, module in enumerate(layer.expert_modules()):
            expert = layer.first_expert + place
            self._on(module, self._expert, layer, expert)
            for name, bank in layer.banks.items():
                self._on(bank.weights[place].module, self._linear, layer, name, expert)

    def _see_batch(self, args: Any, kwargs: dict[str, Any]) -> None:
        self._padding.see(kwargs)

    def _without_padding(self, layer: MoELayer, index: Tensor) -> Tensor:
        """Expert indices ``(N, K)``, those of padding replaced, where a mask of the batch is for these tokens."""
        mask = self._padding.real(layer.name, len(index))
        if mask is None:
            return index
        return torch.where(mask.to(index.device).unsqueeze(1), index, _OUTSIDE)

    def _fused(self, layer: MoELayer, args: Any, kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())  # what transformers' experts interface passes
        hidden, index, weights = given[:3]
        own = [weight.parameter() for bank in layer.banks.values() for weight in bank.weights]
        _check_whole(layer, hidden, index, weights, *own)
        hidden, container = hidden.reshape(-1, hidden.shape[-1]), layer.container()
        index = self._without_padding(layer, index.reshape(len(hidden), -1))
        gated = bool(container.has_gate)
        first, last = "gate_up_proj" if gated else "up_proj", "down_proj"
        order, counts = _by_expert(index, layer.num_experts)
        weights = weights.flatten()[order]
        for expert, matrix, rows, of_rows in zip(
            range(layer.num_experts),
            layer.banks[first].matrices(),
            order.split(counts),
            weights.split(counts),
            strict=True,
        ):
            if not len(rows):
                continue
            x = hidden[rows // index.shape[1]]
            bias = getattr(container, f"{first}_bias")[expert].to(x.dtype) if container.has_bias else None
            inner = F.linear(x, matrix.to(x.dtype), bias)
            inner = apply_gate(container, inner) if gated else container.act_fn(inner)  # type: ignore[operator]
            self._add(layer, first, expert, x, of_rows)
            self._add(layer, last, expert, inner, of_rows)

    def _call(self, layer: MoELayer, args: Any, kwargs: dict[str, Any]) -> None:
        """A container of modules is called: keeps the routing that it is given, if it is."""
        given = (*args, *kwargs.values())
        found = routing(given, layer.num_experts)
        self._called.pop(layer.name, None)
        if found is not None:
            hidden = next(x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2)
            index, weights = found
            weights = None if weights is None else weights.detach()
            self._called[layer.name] = hidden.detach().reshape(-1, hidden.shape[-1]), index, weights

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
        of_rows = (
            torch.ones(len(rows), dtype=torch.float32, device=rows.device) if weights is None else weights[token, place]
        )
        kept = self._without_padding(layer, index)[token, place] == expert
        self._of_rows[layer.name, expert] = of_rows, kept

    def _linear(self, layer: MoELayer, projection: str, expert: int, args: Any, kwargs: dict[str, Any]) -> None:
        x = _rows_of((*args, *kwargs.values()))
        if x is None:
            return
        _check_whole(layer, x, layer.banks[projection].weights[expert - layer.first_expert].parameter())
        weights, kept = self._of_rows.get((layer.name, expert), (None, None))
        if weights is None or kept is None or len(weights) != len(x):
            self._add(layer, projection, expert, x, torch.ones(len(x), dtype=torch.float32, device=x.device))
        else:
            self._add(layer, projection, expert, x[kept], weights[kept])

    def _add(self, layer: MoELayer, projection: str, expert: int, x: Tensor, weights: Tensor) -> None:
        """Adds rows ``(n, in)`` with their weights ``(n,)``."""
        sums, width = self._sums[layer.name], layer.projections[projection][1]
        if x.shape[-1] != width:
            raise StatisticsError(
                f"layer {layer.name!r}: {projection!r} of expert {expert} was given rows of {x.shape[-1]} values, "
                f"expected {width}: are its inputs split over processes (tensor parallelism)?"
            )
        if projection not in sums:
            sums[projection] = torch.zeros(layer.num_experts, width, width, dtype=torch.float32, device=x.device)
        x = x.detach().float() * weights.detach().float().unsqueeze(1)
        sums[projection][expert].addmm_(x.T, x)
        self._rows[layer.name][projection][expert] += len(x)

    def forget_batch(self) -> None:
        """Lets go of the activations that are kept until the next forward pass."""
        self._called, self._of_rows = {}, {}
        self._padding.forget()

    def take(self, into: ExpertStatistics) -> None:
        """Adds what was collected to statistics, layer by layer; the sums are gone afterwards.

        With several processes a collective that sums over all of them: call it on all ranks, for the same layers.

        Raises:
            StatisticsError: No token has reached a matrix of any expert of a layer, or a value is not finite.
        """
        for layer in self._layers:
            sums, moments = self._sums.pop(layer.name), {}
            device = layer.router_is.parameter().device
            for name, (_, width) in layer.projections.items():
                rows = summed(torch.tensor(self._rows[layer.name][name], device=device))
                if not rows.any():
                    raise StatisticsError(
                        f"layer {layer.name!r}: no input of {name!r} was seen. Was there no batch, or are these "
                        "experts called in a way that no hook sees (compiled, or through their parameters)?"
                    )
                own = sums.pop(name, None)
                own = (
                    torch.zeros(layer.num_experts, width, width, dtype=torch.float32, device=device)
                    if own is None
                    else own
                )
                moments[name] = summed(own).div_(rows.clamp(min=1).view(-1, 1, 1).to(own.device))
                if name == layer.first:
                    tokens = rows // self._together
            into.add(layer.name, moments, tokens)

    def close(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget_batch()


class _Hook:
    """A forward hook of a collector, without gradients and autocast; in copies of the model it does nothing."""

    def __init__(self, collector: Collector, function: Any, known: tuple[Any, ...]) -> None:
        self._collector, self._function, self._known = collector, function, known

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        collector = self._collector
        if torch.compiler.is_compiling() or not collector.active or in_backward_pass():
            return
        if uncounted_depth() != collector.depth:
            return
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        try:
            with torch.no_grad(), torch.autocast("cpu" if given is None else given.device.type, enabled=False):
                self._function(*self._known, args, kwargs)
        except Exception as error:
            if collector.raises:
                raise
            collector.error, collector.active = error, False

    def __reduce__(self) -> Any:
        return NoHook, ()


def _by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Places in the flat ``(N, K)`` indices, those of expert 0 first, and how many each expert has."""
    chosen = index.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen.clamp(-1, num_experts) + 1, minlength=num_experts + 2).tolist()
    return order[counts[0] : len(order) - counts[-1]], counts[1:-1]


def _check_whole(layer: MoELayer, *tensors: Tensor) -> None:
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise StatisticsError(
            f"layer {layer.name!r}: its experts are split over processes while they run (expert or tensor "
            "parallelism), so that no process sees all of their inputs: collect statistics from the checkpoint"
        )


def _rows_of(given: tuple[Any, ...]) -> Tensor | None:
    """The activations among what a module is called with, ``(rows, in)``."""
    found = next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)
    return None if found is None else found.reshape(-1, found.shape[-1])
