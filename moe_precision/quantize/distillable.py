"""What is checked before scales are distilled: that a packed model is of the float one, and that layers are plain."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.moe_layers import MoELayer
from ..layers.router_rows import router_row_norms
from ..plans.plan import PrecisionPlan
from ..recording.processes import highest
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


def without_ddp(model: nn.Module) -> nn.Module:
    """What DDP is around: layers have their names in it, and its hooks run in DDP's forward pass too."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_same_plan(plan: PrecisionPlan, device: torch.device) -> None:
    """Checks that all processes have one plan; a collective.

    Args:
        plan: Of this process.
        device: One that the processes communicate from.

    Raises:
        DistillError: They have different ones.
    """
    widths = zlib.crc32(
        repr([plan.group_size, {name: one.projection_bits for name, one in plan.layers.items()}]).encode()
    )
    if highest(widths, device) != -highest(-widths, device):
        raise DistillError("the processes of this run have made different plans: distill from the checkpoint instead")
