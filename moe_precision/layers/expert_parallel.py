"""Experts that are split over processes as plain tensors: each process holds some, and the router knows all.

Megatron, DeepSpeed-MoE and OLMo-core's second version train so. DTensors need none of this: they have the whole shape.
Process ``r`` holds experts ``r * n`` to ``(r + 1) * n - 1``, as all of them have it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .module_tree import MoELayerError, Node

_LOCAL_COUNTS = ("num_local_experts", "experts_per_rank")
_CLIMB = 2  # parents of the experts that may state how many are local


def states_local_count(tree: Node, path: str, count: int) -> bool:
    """Whether the experts' module, or one just around it, says that ``count`` experts are those of this process."""
    parts = path.split(".") if path else []
    paths = [".".join(parts[: len(parts) - up]) for up in range(min(_CLIMB, len(parts)) + 1)]
    around: list[nn.Module] = [tree.get(one).module for one in paths]
    return any(value == count for module in around for value in local_counts(module))


def local_counts(module: nn.Module) -> list[int]:
    """How many experts are those of this process, as a module states it under one name or another."""
    stated = [getattr(module, name, None) for name in _LOCAL_COUNTS]
    return [value for value in stated if type(value) is int]


def processes_of(path: str, local: int, experts: int) -> int:
    """Over how many processes the experts of a layer are split.

    Args:
        path: Of the layer, for the message.
        local: Experts that this process holds.
        experts: Experts that the router knows.

    Raises:
        MoELayerError: Others run together than the experts are split over, so that it is not known who holds which.
    """
    parts = experts // local
    running = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if parts > 1 and running != parts:
        raise MoELayerError(
            f"layer {path!r}: this process holds {local} of {experts} experts, which are split over {parts} processes "
            f"(expert parallelism), but {running} run together: expected one group of {parts}. Gather the experts "
            "(a checkpoint in transformers' form), or train with expert parallelism over all processes"
        )
    return parts


def from_owner(own: Tensor, owner: int) -> Tensor:
    """A matrix that one process holds, on all of them; a collective.

    Args:
        own: The matrix on process ``owner``; on the others any of the same shape, dtype and device.
        owner: Rank of the process that holds it.
    """
    value = own.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(value, src=owner)
    return value


def of_all(values: Tensor, parts: int) -> Tensor:
    """Values ``(local experts, ...)`` of all processes, ``(all experts, ...)`` in order; a collective where split."""
    if parts == 1:
        return values
    found = [torch.empty_like(values) for _ in range(parts)]
    dist.all_gather(found, values.contiguous())
    return torch.cat(found)
