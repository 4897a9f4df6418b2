"""Whether a model's weights are still those of an earlier moment, from a few values of each; never a collective."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_precision.layers.moe_layers import MoELayer

_VALUES = 16  # of every router and expert parameter, as this process holds it


class WeightsSeen:
    """Remembers values of the routers and experts of some layers, to notice that somebody has replaced them.

    Weights that FSDP1 or DeepSpeed ZeRO-3 has sharded, and those behind adapters, are not looked at.

    Other callbacks and the module itself may change weights after the last step: averages, the best checkpoint, the
    evaluation mode of a schedule-free optimizer. No list of names has them all.
    """

    def __init__(self) -> None:
        self._sample: Tensor | None = None

    def look(self, layers: list[MoELayer]) -> None:
        """Remembers the values of now."""
        self._sample = _sample(layers)

    def changed(self, layers: list[MoELayer]) -> bool:
        """Whether they are others now; False if nothing was remembered."""
        return self._sample is not None and not torch.equal(self._sample.nan_to_num(), _sample(layers).nan_to_num())

    def forget(self) -> None:
        """Lets go of what was remembered."""
        self._sample = None


@torch.no_grad()
def _sample(layers: list[MoELayer]) -> Tensor:
    values = [torch.zeros(1, dtype=torch.float32)]
    for layer in layers:
        for weight in (layer.router_is, *(weight for bank in layer.banks.values() for weight in bank.weights)):
            if weight.gathers or weight.is_adapted:  # merging an adapter changes no effective weight
                continue
            parameter = weight.parameter().detach()
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            flat = local.reshape(-1)
            values.append(flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].float())
    device = values[-1].device
    return torch.cat([value.to(device) for value in values]).cpu()
