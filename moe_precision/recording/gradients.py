"""Curvature from losses of some training batches, for experts whose optimizer keeps no second moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..layers.module_tree import Weight, modes_kept
from ..layers.moe_layers import MoELayer
from .curvature import Curvature, CurvatureError, Means, row_and_column_means, stacks_of


def curvature_of_losses(layers: list[MoELayer], losses: Iterable[Callable[[], Tensor | None]]) -> Curvature:
    """Means of the squared gradients over some losses.

    With several processes it is a collective: DDP and FSDP2 average the gradients of what they train, and those of
    frozen experts are averaged here. Afterwards expert weights have no gradient, and other parameters keep the one of
    the last loss.

    Args:
        layers: As found by `find_moe_layers`; frozen experts are unfrozen while this runs.
        losses: Each computes the loss of one batch, ``()``, or None to skip it; batches of training's size keep costs
            on the scale that an optimizer's second moments give.

    Raises:
        CurvatureError: There is no loss, a gradient is not finite, or none reaches any expert of a layer.
    """
    if split := [layer.name for layer in layers if layer.parts > 1]:
        raise CurvatureError(
            f"the experts of {split[0]!r} are split over processes (expert parallelism), whose gradients only the "
            "trainer averages: there the second moments of an optimizer are read, and no further batches"
        )
    weights = [weight for layer in layers for bank in layer.banks.values() for weight in bank.weights]
    parameters, stacks = [weight.parameter() for weight in weights], stacks_of(layers)
    sums: dict[int, Means] = {}
    count = 0
    with _unfrozen(parameters) as frozen:
        for loss in losses:
            for parameter in parameters:
                parameter.grad = None
            value = loss()
            if value is None:
                continue
            value.backward()
            count += 1
            _average_over_processes(frozen)
            for parameter in parameters:
                if parameter.grad is not None:
                    rows, columns = row_and_column_means(parameter.grad.float().square(), stacks.get(id(parameter)))
                    before = sums.get(id(parameter))
                    sums[id(parameter)] = (rows, columns) if before is None else (before[0] + rows, before[1] + columns)
    if count == 0:
        raise CurvatureError("no batch gave a loss to take gradients of")

    def means_of(weight: Weight) -> Means | None:
        found = sums.get(id(weight.parameter()))
        return None if found is None or not found[0].any() else (found[0] / count, found[1] / count)

    return Curvature.of(layers, means_of)


@contextmanager
def _unfrozen(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, all parameters require gradients; yields those that otherwise do not. None has a gradient afterwards."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield frozen
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(False)


def _average_over_processes(frozen: Sequence[Tensor]) -> None:
    """Averages the gradients of frozen parameters, which DDP leaves alone; FSDP2 has averaged its own already."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for parameter in frozen:
        if not isinstance(parameter, DTensor):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Restores the buffers and modes of a model afterwards, and leaves no gradient."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with modes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        model.zero_grad(set_to_none=True)
