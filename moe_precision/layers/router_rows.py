"""The norm of router rows: one definition for models in memory, checkpoints on disk and quantized models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def router_row_norms(weight: Tensor, *, num_experts: int, transposed: bool = False) -> Tensor:
    """L2 norm of the router row of each expert.

    Args:
        weight: The router's weight as it is stored, ``(rows, d)``, or ``(d, rows)`` if ``transposed``; any float dtype.
            A DTensor makes this a collective.
        num_experts: ``E``; rows beyond it are those of shared or null experts, which come last.
        transposed: The rows are stored as columns. A shape does not show it: see `MoELayer.router_transposed`.

    Returns:
        ``(E,)`` float32 on the weight's device.

    Raises:
        ValueError: The weight has fewer rows than there are experts, or is not a matrix.
    """
    if weight.ndim != 2 or weight.shape[1 if transposed else 0] < num_experts:
        stored = "(d, rows)" if transposed else "(rows, d)"
        raise ValueError(
            f"router weight has shape {tuple(weight.shape)}, expected {stored} with at least {num_experts} rows"
        )
    norms = torch.linalg.vector_norm(weight, dim=0 if transposed else 1, dtype=torch.float32)  # (rows,)
    if isinstance(norms, DTensor):
        norms = norms.full_tensor()
    found: Tensor = norms if len(norms) == num_experts else norms[:num_experts]
    return found
