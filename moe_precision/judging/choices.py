"""Which experts each token is sent to, in a float model and in those made of it: seen when the experts are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.module_tree import MoELayerError, module_tree, root_model
from ..layers.moe_layers import MoELayer, find_moe_layers
from ..recording.loads import routing

Choices = dict[str, Tensor]  # path of a layer's experts -> (tokens, K) int16, each row sorted


@dataclass(frozen=True)
class Place:
    """Where the experts of a layer are, in a float model and in its quantized ones.

    Attributes:
        path: Clean path of the module that holds them.
        num_experts: How many there are.
        encoder: They see the tokens of the encoder's input, not those that the targets follow.
    """

    path: str
    num_experts: int
    encoder: bool


def places_of(model: nn.Module, layers: Sequence[MoELayer] | None = None) -> list[Place]:
    """The places of all experts of a float model; none for a dense one.

    Args:
        model: A causal or a sequence-to-sequence language model.
        layers: Its layers, where they are known; else those that `find_moe_layers` finds.
    """
    if layers is None:
        try:
            layers = find_moe_layers(model)
        except MoELayerError:
            return []
    root: Any = root_model(model)
    inside = set(root.get_encoder().modules()) if root.config.is_encoder_decoder else set()
    return [Place(layer.experts, layer.num_experts, layer.container() in inside) for layer in layers]


def containers(model: nn.Module, places: Sequence[Place]) -> dict[Place, nn.Module]:
    """The modules at these places in a float or quantized model; places that it does not have are left out."""
    found = {node.path: node.module for node in module_tree(model).nodes()} if places else {}
    return {place: found[place.path] for place in places if place.path in found}


@contextmanager
def watched(modules: dict[Place, nn.Module]) -> Iterator[Choices]:
    """Inside, one forward pass of the model fills the dict that is yielded, with all tokens of a batch in order.

    Experts that are not called with the chosen indices, or more than once, are not in it when the block ends.
    """
    seen: Choices = {}
    twice: set[str] = set()

    def hook(place: Place) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            found = routing((*args, *kwargs.values()), place.num_experts)
            if found is not None:
                twice.update({place.path} & seen.keys())
                seen[place.path] = found[0].sort(dim=-1).values.to(torch.int16)

        return keep

    handles = [one.register_forward_pre_hook(hook(place), with_kwargs=True) for place, one in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for path in twice:
            del seen[path]


def counted(places: Sequence[Place], choices: Choices, tokens: dict[bool, Tensor]) -> Choices:
    """Choices of the tokens that count, on the CPU; layers that do not see a batch token by token are left out.

    Args:
        places: Of the experts.
        choices: As `watched` leaves them.
        tokens: Which tokens count: in the encoder (True) and elsewhere (False), ``(tokens,)`` bool each.
    """
    return {
        place.path: choices[place.path][tokens[place.encoder]].cpu()
        for place in places
        if place.path in choices and len(choices[place.path]) == len(tokens[place.encoder])
    }


def unchanged(places: Sequence[Place], first: Choices, second: Choices) -> Tensor | None:
    """Whether each token goes to the same experts in every layer that it passes, ``(tokens,)`` bool.

    Tokens of an encoder are tokens of their own. None where the experts of a layer cannot be seen, or there are none.
    """
    same: dict[bool, Tensor] = {}
    for place in places:
        a, b = first.get(place.path), second.get(place.path)
        if a is None or b is None or a.shape != b.shape:
            return None
        equal = (a == b).all(dim=-1)
        same[place.encoder] = same[place.encoder] & equal if place.encoder in same else equal
    return torch.cat(list(same.values())) if same else None
