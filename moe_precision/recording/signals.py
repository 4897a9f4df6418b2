"""What is known of each expert when training ends: one pure function per signal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..layers.router_rows import router_row_norms

_BLOCK = 2**18  # weights
_ROUNDING = 1.02  # a norm in bfloat16 is accurate to one part in 256


def router_norm_change(first: Tensor, last: Tensor) -> Tensor:
    """Change of each expert's router L2 norm over training: ``||row_e(last)|| - ||row_e(first)||`` (arXiv 2604.06515).

    A signed difference of norms, not the norm of a difference. Experts with the smallest change have learned rare but
    critical features and get the most bits.

    Args:
        first: Router weight at the baseline, ``(E, d)``, any float dtype.
        last: Router weight at the end, ``(E, d)``.

    Returns:
        ``(E,)`` float32.
    """
    if first.shape != last.shape or first.ndim != 2:
        raise ValueError(f"expected two router weights of one shape (E, d), got {first.shape} and {last.shape}")
    experts = len(first)
    return router_row_norms(last, num_experts=experts) - router_row_norms(first, num_experts=experts)


def max_variance(first_projection: Tensor) -> Tensor:
    """Maximum intra-neuron variance of one expert: the largest variance within a row of ``W1`` (arXiv 2604.06515).

    Args:
        first_projection: ``(neurons, d)``, rows are the expert's hidden neurons (``wi``, ``w1`` or the gate).

    Returns:
        Scalar float32: the population variance (divided by d) of the row where it is largest.
    """
    if isinstance(first_projection, DTensor):
        return first_projection.float().var(dim=1, correction=0).max()
    # A row's mean square is at least its variance, and one pass gives it: only rows near the largest need the second.
    mean_squares = torch.linalg.vector_norm(first_projection, dim=1).float().square() / first_projection.shape[1]
    reached = _largest_variance(first_projection[mean_squares.argmax()].unsqueeze(0))
    return _largest_variance(first_projection[~(mean_squares * _ROUNDING < reached)])


def expert_load(index: Tensor, weights: Tensor | None, num_experts: int) -> Tensor:
    """Tokens that each expert received, and the sum of the weights with which the router sent them.

    Args:
        index: Chosen experts, any shape, as ``(N, K)``; an index outside ``0..E - 1`` is no expert.
        weights: Routing weight of each choice, the same shape; None where they are not known.
        num_experts: ``E``.

    Returns:
        ``(2, E)`` float32: tokens, summed routing weight (NaN if not known).
    """
    chosen = index.flatten().long()
    chosen = torch.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    load = torch.zeros(2, num_experts + 1, dtype=torch.float32, device=index.device)
    load[0].scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))  # 1-D: deterministic on GPUs too
    if weights is None:
        load[1] = torch.nan
    else:
        load[1].scatter_add_(0, chosen, weights.flatten().float())
    return load[:, :num_experts]


def _largest_variance(rows: Tensor) -> Tensor:
    largest = []
    for block in rows.split(max(1, _BLOCK // rows.shape[1])):  # so that the float32 copies stay in the cache
        values = block.float()
        centred = values - values.mean(dim=1, keepdim=True)
        largest.append(centred.square_().sum(dim=1).max())
    return torch.stack(largest).max() / rows.shape[1]
