"""Norms, variances and costs straight from a checkpoint's safetensors files; no weight of a model is allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.checkpoint import Checkpoint, opened
from ..checkpoints.headers import CheckpointError
from ..layers.moe_layers import MoELayer
from ..recording.curvature import Curvature
from ..recording.router_norms import RouterNormHistory
from ..recording.signals import max_variance
from .costs import Costs, costs_of_matrices


def signals_of_checkpoint(
    folder: Checkpoint | str | os.PathLike, variance: bool = True, patterns: dict[str, Any] | None = None
) -> RouterNormHistory:
    """A history with one record, at step 0: the router norms of a checkpoint, and its variances.

    Args:
        folder: What ``save_pretrained`` writes: config.json and safetensors, sharded or not, under hub names or not; or
            an open `Checkpoint`.
        variance: Read the experts' first projections too, for the maximum intra-neuron variance.
        patterns: ``router_pattern`` and ``expert_pattern`` for `find_moe_layers`.

    Raises:
        CheckpointError: A file is missing or truncated, a tensor is missing, or a router holds NaN or infinity.
        StreamingError: transformers converts these tensors by more than renaming, stacking and joining.
        MoELayerError: The model has no Mixture-of-Experts layer.
    """
    with opened(folder) as checkpoint:
        _check_float(checkpoint)
        layers = checkpoint.layers(patterns)
        history = RouterNormHistory.of(layers, checkpoint.model_type, patterns)
        history.record(0, torch.cat([_router_norms(layer, checkpoint) for layer in layers]))
        if broken := history.not_finite():
            where = broken.removesuffix(" at step 0")
            raise CheckpointError(f"{str(checkpoint.folder)!r}: {where}; the weights are damaged")
        if variance:
            experts = sum(layer.num_experts for layer in layers)
            with tqdm(total=experts, desc="variance", unit="expert", disable=None if experts >= 64 else True) as bar:
                for layer in layers:
                    matrices = checkpoint.matrices(layer, layer.first, neurons_alone=True)
                    history.max_variance[layer.name] = torch.stack([max_variance(matrix) for matrix in matrices])
                    bar.update(layer.num_experts)
    return history


def costs_of_checkpoint(
    folder: Checkpoint | str | os.PathLike,
    widths: Sequence[int],
    group_size: int,
    curvature: Curvature | None = None,
    patterns: dict[str, Any] | None = None,
) -> Costs:
    """`expert_costs` of a checkpoint, with one expert matrix in memory at a time.

    Args:
        folder: As in `signals_of_checkpoint`.
        widths: Candidate widths.
        group_size: Weights that share a scale and an offset.
        curvature: Weighs fit and errors; None for squared weight errors.
        patterns: ``router_pattern`` and ``expert_pattern`` for `find_moe_layers`.

    Raises:
        CheckpointError: A file or tensor is missing or damaged.
        StreamingError: As in `signals_of_checkpoint`.
        CostError: A matrix cannot be quantized.
    """
    with opened(folder) as checkpoint:
        _check_float(checkpoint)
        return costs_of_matrices(checkpoint.layers(patterns), checkpoint.matrices, widths, group_size, curvature)


def _check_float(checkpoint: Checkpoint) -> None:
    if checkpoint.is_quantized:
        raise CheckpointError(f"{str(checkpoint.folder)!r} is quantized; give the float checkpoint")


def _router_norms(layer: MoELayer, checkpoint: Checkpoint) -> Tensor:
    rows = checkpoint.router_weight(layer)[: layer.num_experts]
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
