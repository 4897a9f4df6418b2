"""What is known of each expert when training ends: one pure function a signal."""

from __future__ import annotations

import torch
from torch import Tensor


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
    norm = torch.linalg.vector_norm
    return norm(last, dim=-1, dtype=torch.float32) - norm(first, dim=-1, dtype=torch.float32)


def max_variance(first_projection: Tensor) -> Tensor:
    """Maximum intra-neuron variance of one expert: the largest variance within a row of ``W1`` (arXiv 2604.06515).

    Args:
        first_projection: ``(neurons, d)``, rows are the expert's hidden neurons (``wi``, ``w1`` or the gate).

    Returns:
        Scalar float32: the population variance (divided by d) of the row where it is largest.
    """
    return first_projection.float().var(dim=1, correction=0).max()
