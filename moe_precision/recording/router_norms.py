"""Router norms and intra-neuron variances of every expert, read from the layers of a live model.

Pure PyTorch: no trainer, no logger, no file. Values are float32 whatever the training dtype.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..layers.banks import Bank
from ..layers.module_tree import whole
from ..layers.moe_layers import MoELayer
from .signals import max_variance

_ADVICE = (
    "Is it from another run, or of another step? For weights of another step of the same run, "
    "`moe-precision plan HISTORY --final CHECKPOINT -o PLAN` makes a plan without it"
)


def router_norms(layers: list[MoELayer]) -> Tensor:
    """L2 norm of every expert's router row, all layers in one tensor.

    Under FSDP and DeepSpeed ZeRO-3 this is a collective: call it on all ranks.

    Args:
        layers: As found by `find_moe_layers`.

    Returns:
        ``(sum of num_experts,)`` float32 on the routers' device, layer after layer.

    Raises:
        MoELayerError: A router cannot be read whole, which would give a wrong norm.

    Example:
        >>> router_norms(find_moe_layers(model)).shape
        torch.Size([16])
    """
    norms: list[Tensor] = []
    with torch.no_grad():
        if not any(layer.router_is.gathers for layer in layers):
            return torch.cat([layer.row_norms() for layer in layers])
        for _, group in groupby(layers, key=lambda layer: id(layer.router_is.unit)):  # one FSDP1 unit at a time
            of_unit = list(group)
            with whole(layer.router_is for layer in of_unit):
                norms += [layer.row_norms() for layer in of_unit]
        return torch.cat(norms)


def norms_by_layer(layers: list[MoELayer]) -> dict[str, Tensor]:
    """`router_norms` by layer name, each ``(E,)`` float32 on the CPU; a collective where that is one."""
    norms = router_norms(layers).cpu().split([layer.num_experts for layer in layers])
    return {layer.name: of_layer.clone() for layer, of_layer in zip(layers, norms, strict=True)}


def check_same_weights(
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    what: str,
    error: type[Exception],
    advice: str = _ADVICE,
) -> None:
    """Checks by router norms that something was made from these weights, possibly in another dtype.

    Args:
        expected: Layer name -> ``(E,)`` float32, from when it was made.
        found: Layer name -> ``(E,)`` of the weights at hand, any float dtype.
        what: What was made, for the message.
        error: Raised where norms differ by more than rounding to another dtype explains.
        advice: What to do then, the end of the message.
    """
    for name, norms in expected.items():
        now = found[name].detach().float().cpu()
        if not torch.allclose(now, norms, rtol=2e-3, atol=0):
            difference = float(((now - norms).abs() / norms.clamp(min=1e-30)).max())
            raise error(
                f"the {what} belongs to other weights: router norms in {name!r} differ by up to {difference:.2%}. "
                f"{advice}"
            )


def max_variances(layer: MoELayer) -> Tensor:
    """Maximum intra-neuron variance of every expert of a layer, ``(E,)`` float32 on the CPU; a collective when sharded.

    Reads one expert at a time; under FSDP2 each rank reads the experts that it holds.
    """
    bank = layer.banks[layer.first]
    with torch.no_grad(), layer.whole():
        parameter = bank.weights[0].read()
        if len(bank.weights) == 1 and isinstance(parameter, DTensor):
            return _of_sharded_bank(layer, bank, parameter)[: layer.num_experts].cpu()
        values = [max_variance(layer.neurons(matrix)) for matrix in bank.matrices()]
        values = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
        return torch.stack(values).cpu()


def _of_sharded_bank(layer: MoELayer, bank: Bank, parameter: DTensor) -> Tensor:
    by_expert = parameter.ndim == 3 and all(type(p) is Replicate or p == Shard(0) for p in parameter.placements)
    local = parameter.to_local() if by_expert else parameter.full_tensor()  # (some or all experts, ...)
    if parameter.ndim == 2:
        local = local.unflatten(0, (layer.num_experts, -1))
    values = [max_variance(layer.neurons(one.T if bank.transposed else one)) for one in local]
    stacked = torch.stack(values) if values else local.new_empty(0, dtype=torch.float32)
    if not by_expert:
        return stacked
    experts = (parameter.shape[0],)
    placed = DTensor.from_local(
        stacked, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(experts), stride=(1,)
    )
    return placed.full_tensor()
