"""What published criteria of expert pruning look at, and what may stand in the place of a dropped expert.

Criteria are numbers per expert; the experts with the least are dropped. Everything here works on live transformers
models: on those whose experts are fused and run through its experts interface, and on Switch Transformers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moe_precision.compat import apply_gate
from moe_precision.layers.moe_layers import MoELayer

Dropped = Mapping[str, Sequence[int]]  # layer -> experts
PLACES = ("nothing", "mean output", "weight to the others", "next best expert")


@dataclass
class Seen:
    """What an expert did on some batches.

    Attributes:
        tokens: Number of tokens, ``(E,)``.
        reap: Mean over these tokens of gate value times norm of the output, ``(E,)``: REAP (arXiv 2510.13999).
        mean_output: The vector nearest to its outputs in squares weighted by squared gate values, ``(E, H)``.
    """

    tokens: Tensor
    reap: Tensor
    mean_output: Tensor


@torch.no_grad()
def seen_experts(model: nn.Module, layers: Sequence[MoELayer], batches: Iterable[dict[str, Tensor]]) -> dict[str, Seen]:
    """Runs a model on batches and watches all experts of some layers."""
    sums: dict[str, list[Tensor]] = {}

    def watch(layer: MoELayer, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden, index, weights = (*args, *kwargs.values())[:3]
        index = _chosen(index)
        for expert in range(layer.num_experts):
            token, place = torch.where(index == expert)
            output, gate = _output(layer, module, expert, hidden[token]), weights[token, place].unsqueeze(1)
            tokens, saliency, total, of_gate = sums[layer.name]
            tokens[expert] += len(token)
            saliency[expert] += (gate[:, 0] * output.norm(dim=1)).sum()
            total[expert] += (gate.square() * output).sum(0)
            of_gate[expert] += gate.square().sum()

    handles = []
    for layer in layers:
        experts, width = layer.num_experts, layer.width
        sums[layer.name] = [
            torch.zeros(experts),
            torch.zeros(experts),
            torch.zeros(experts, width),
            torch.zeros(experts),
        ]
        handles.append(layer.container().register_forward_pre_hook(partial(watch, layer), with_kwargs=True))
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Seen(tokens, saliency / tokens.clamp(min=1), total / of_gate.clamp(min=1e-12).unsqueeze(1))
        for name, (tokens, saliency, total, of_gate) in sums.items()
    }


def _output(layer: MoELayer, module: Any, expert: int, hidden: Tensor) -> Tensor:
    """What an expert makes of ``(n, H)``, before its gate value."""
    if not layer.fused:
        return module[f"expert_{expert}"](hidden)
    inner = apply_gate(module, hidden @ layer.banks["gate_up_proj"].read(expert).T)
    return inner @ layer.banks["down_proj"].read(expert).T


def _chosen(index: Tensor) -> Tensor:
    """The chosen experts, ``(N, k)``: as given, or from Switch's mask ``(N, 1, E)``, -1 beyond an expert's capacity."""
    if index.ndim == 2:
        return index
    return torch.where(index.sum(-1) > 0, index.argmax(-1), -1)


@contextmanager
def in_place_of(
    place: str, layers: Sequence[MoELayer], dropped: Dropped, seen: Mapping[str, Seen], model: nn.Module
) -> Iterator[None]:
    """Inside, something stands in the place of dropped experts, whose own matrices are 0.

    Args:
        place: One of `PLACES`.
        layers: Of the model.
        dropped: Experts by layer.
        seen: For the mean outputs.
        model: The live model.
    """
    handles: list[Any] = []
    for layer in layers:
        gone = torch.zeros(layer.num_experts, dtype=torch.bool)
        gone[list(dropped[layer.name])] = True
        experts = layer.container()
        levels = 1 if layer.fused else 2  # Switch's router is around the module that has the weight
        router = model.get_submodule(layer.router.rsplit(".", levels)[0])
        if place == "next best expert":
            handles.append(router.register_forward_hook(partial(_reroute, gone)))
        elif place == "weight to the others" and layer.fused:  # Switch's one expert has no others
            handles.append(experts.register_forward_pre_hook(partial(_rescale, gone)))
        elif place == "mean output":
            vectors = seen[layer.name].mean_output * gone.unsqueeze(1)
            handles.append(experts.register_forward_hook(partial(_add, vectors)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reroute(gone: Tensor, router: Any, args: Any, output: Any) -> Any:
    """The router's choice among the experts that are left, as if the rows of the others had been cut."""
    if isinstance(router, SwitchTransformersTop1Router):
        best, index = output[2].float().masked_fill(gone, -torch.inf).softmax(-1).max(-1, keepdim=True)
        mask = torch.zeros_like(output[0]).scatter_(-1, index, 1)
        return mask * (mask.cumsum(-2) <= router.expert_capacity), best.to(output[1].dtype), output[2]
    logits, scores, _ = output
    probabilities = logits.float().masked_fill(gone, -torch.inf).softmax(-1)
    values, index = probabilities.topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return logits, values.to(scores.dtype), index


def _rescale(gone: Tensor, experts: nn.Module, args: Any) -> Any:
    hidden, index, weights = args
    left = weights.masked_fill(gone[index], 0)
    share = weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp(min=1e-12)
    return hidden, index, torch.where(left.sum(-1, keepdim=True) > 0, left * share, left)


def _add(vectors: Tensor, experts: nn.Module, args: Any, output: Tensor) -> Tensor:
    index, weights = _chosen(args[1]), args[2]
    weights = weights.masked_fill(index < 0, 0)
    return output + (vectors[index] * weights.unsqueeze(-1)).sum(1).to(output.dtype)


CRITERIA: dict[str, Callable[[Seen, Tensor], Tensor]] = {
    "REAP": lambda seen, change: seen.reap,
    "load": lambda seen, change: seen.tokens,
    "norm changed most": lambda seen, change: -change,
}
