"""Sums and decisions over all processes of a run; on a single process they change nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..compat import split_by

T = TypeVar("T")
_TENSOR_PARALLEL = re.compile(r"(?:^|_)(?:tp|tensor)(?:_|$)", re.IGNORECASE)
_GOES_ON, _ENDED, _FAILED = 0, 1, 2  # in order of weight: the highest of all processes counts


def world_size() -> int:
    """How many processes run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return world_size() == 1 or dist.get_rank() == 0


def processes_per_batch(model: nn.Module) -> int:
    """How many processes run each batch together, in tensor parallelism; 1 where each has batches of its own.

    transformers says so in the config. Else the meshes of the parameters show it: all of their dimensions if FSDP2 has
    no part in them, and otherwise those that are named for it (``tp``, ``tensor_parallel``).
    """
    sizes = [split_by(module).get("tp_size", 1) for module in model.modules() if isinstance(module, PreTrainedModel)]
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for mesh in {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}:
        names = mesh.mesh_dim_names or ("",) * mesh.ndim
        together = [mesh.size(dim) for dim, name in enumerate(names) if not sharded or _TENSOR_PARALLEL.search(name)]
        sizes.append(math.prod(together))
    return max(sizes, default=1)


def highest(value: int, device: torch.device) -> int:
    """The highest value of all processes; a collective.

    Args:
        value: Of this process.
        device: One that the processes communicate from, such as that of the model.
    """
    if world_size() == 1:
        return value
    together = torch.tensor(value, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return int(together)


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place where the tensor allows it; a collective."""
    if world_size() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds up the gradients of all processes, in place; a collective. None stays where no process has one.

    Args:
        parameters: The same ones in the same order on every process, all of one dtype and device.
    """
    if world_size() == 1 or not parameters:
        return
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    there = parameters[0].new_tensor([float(one.grad is not None) for one in parameters])
    *sums, there = summed(torch.cat([*(one.flatten() for one in gradients), there])).split(
        [*(one.numel() for one in parameters), len(parameters)]
    )
    for parameter, gradient, anywhere in zip(parameters, sums, there.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter) if anywhere else None


def of_first(values: Tensor) -> Tensor:
    """The values that the first process has, in place where the tensor allows it; a collective."""
    if world_size() > 1:
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


def taken_together(items: Iterable[T], count: int, device: torch.device, error: type[Exception]) -> list[T]:
    """The first items of an iterable of this process: as many on every process, ``count`` at most; a collective.

    Raises:
        Exception: What the iterable has raised, or ``error`` where that of another process did.
    """
    taken: list[T] = []
    run_together([lambda: taken.extend(islice(items, count))], device, error)
    return taken[: -highest(-len(taken), device)]


def run_together(steps: Iterable[Callable[[], object]], device: torch.device, error: type[Exception]) -> None:
    """Calls each step once, the same number on every process: all stop where the first has no more, or has failed.

    Args:
        steps: Of this process.
        device: One that the processes communicate from.
        error: Raised on a process whose own steps were fine, with a message.

    Raises:
        Exception: What a step of this process has raised, or ``error``.
    """
    remaining, failed = iter(steps), None
    while True:
        step = None
        if failed is None:
            try:
                step = next(remaining, None)
            except Exception as reason:
                failed = reason
        state = highest(_FAILED if failed is not None else _ENDED if step is None else _GOES_ON, device)
        if failed is not None:
            raise failed
        if state == _FAILED:
            raise error("it failed on another process")
        if step is None or state == _ENDED:
            return
        try:
            step()
        except Exception as reason:  # raised once the others know
            failed = reason
