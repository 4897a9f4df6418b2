"""Which experts a process holds: with several processes each keeps some of them whole, so no packed matrix is cut."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ServingError


def even_share(num_experts: int, rank: int, ranks: int) -> list[int]:
    """The experts of one of several processes, in blocks that differ by one expert at most.

    Args:
        num_experts: How many the layer has.
        rank: Which process, from 0.
        ranks: How many processes.

    Raises:
        ServingError: There are fewer experts than processes.

    Example:
        >>> [even_share(8, rank, 3) for rank in range(3)]
        [[0, 1], [2, 3, 4], [5, 6, 7]]
    """
    if num_experts < ranks:
        raise ServingError(
            f"a layer has {num_experts} experts, and there are {ranks} processes to hold them: packed experts are not "
            f"cut, so use at most {num_experts} processes"
        )
    return list(range(num_experts * rank // ranks, num_experts * (rank + 1) // ranks))


def mapped_share(expert_map: Sequence[int]) -> list[int]:
    """The experts of this process by an engine's map, in the order of their places.

    Args:
        expert_map: For each expert its place in this process, below 0 where it is in another one.

    Raises:
        ServingError: The order is not that of the experts, or a place is missing.

    Example:
        >>> mapped_share([-1, 0, -1, 1])
        [1, 3]
    """
    held = [expert for expert, place in enumerate(expert_map) if place >= 0]
    if [expert_map[expert] for expert in held] != list(range(len(held))):
        raise ServingError(
            f"the engine places experts as {list(expert_map)}, expected rising places from 0: start it without load "
            "balancing of experts"
        )
    return held
