"""What is checked before scales are distilled: that a packed model is of the float one, and that layers are plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.moe_layers import MoELayer
from ..layers.router_rows import router_row_norms
from ..recording.router_norms import check_same_weights
from .trainable import DistillError


@torch.no_grad()
def check_routers(layers: list[MoELayer], packed: nn.Module) -> None:
    """Checks that a packed model is of the float model with these layers, by the routers, which packing leaves.

    Raises:
        DistillError: Its routers are others.
    """
    own = dict(packed.named_parameters(remove_duplicate=False))
    if missing := [layer.router for layer in layers if layer.router not in own]:
        raise DistillError(f"the packed model has no {missing[0]!r}: it is not of this float model")
    norms = {
        layer.name: router_row_norms(
            own[layer.router], num_experts=layer.num_experts, transposed=layer.router_transposed
        ).cpu()
        for layer in layers
    }
    check_same_weights(norms, {layer.name: layer.row_norms() for layer in layers}, "packed model", DistillError)


def check_plain(model: nn.Module, layers: list[MoELayer]) -> None:
    """Checks that the layers of a live model can be run with other experts in place of its own.

    Args:
        model: The model that the names of the layers are relative to.
        layers: Its layers.

    Raises:
        DistillError: Experts are sharded, behind adapters, or behind wrappers that change their names.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for weight in (weight for layer in layers for bank in layer.banks.values() for weight in bank.weights):
        parameter = weight.parameter()
        if weight.gathers or weight.is_adapted or type(parameter.data) is not Tensor:
            raise DistillError(
                f"{weight.name!r} is sharded or behind an adapter, where scales cannot be distilled: save the model "
                "(merged), and run `moe-precision quantize --distill-steps` on the checkpoint"
            )
        if own.get(weight.name) is not parameter:
            raise DistillError(f"{weight.name!r} is behind a wrapper of {type(model).__name__}: unwrap it")
