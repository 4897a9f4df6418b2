"""Whether a model holds weights at all: one on the meta device has names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable

from .module_tree import MoELayerError
from .moe_layers import MoELayer


def check_materialized(layers: Iterable[MoELayer]) -> None:
    """Checks that the routers and experts of some layers are not on the meta device, before any is read.

    Raises:
        MoELayerError: One is.
    """
    for layer in layers:
        for weight in (layer.router_is, *(weight for bank in layer.banks.values() for weight in bank.weights)):
            if weight.parameter().is_meta:
                raise MoELayerError(
                    f"{weight.name!r} is on the meta device, which holds shapes and no weights: load the model with "
                    "from_pretrained, or give the folder of its checkpoint; `moe-precision estimate` tells sizes from "
                    "config.json alone"
                )
