"""What the recording callbacks take from training batches after the last step: curvature and expert statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_precision.layers.module_tree import root_model
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.collecting import collect_from_steps, memory_bytes
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.gradients import curvature_of_losses, left_as_it_is
from moe_precision.recording.second_moments import curvature_of
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError, file_bytes

Loss = Callable[[], Tensor | None]  # of one batch
Step = Callable[[], Any]  # the forward pass of one batch


def curvature_of_run(
    model: nn.Module,
    layers: list[MoELayer],
    optimizers: Sequence[Any],
    losses: Iterable[Loss],
    batches: int | None,
    owner: str,
) -> Curvature | None:
    """Means of the optimizer's second moments, or of squared gradients of the first losses where those are asked for.

    Args:
        model: The model, or what is around it.
        layers: Its layers.
        optimizers: That have trained the experts.
        losses: Of training batches.
        batches: How many losses to take gradients of; None reads the optimizers.
        owner: Name of the callback, for messages.
    """
    try:
        if batches is None:
            return curvature_of(layers, optimizers)
        with left_as_it_is(model):
            taken = list(islice(losses, batches))
            if len(taken) < batches:
                rank_zero_warn(f"{owner}: only {len(taken)} batches to take gradients on.")
            return curvature_of_losses(layers, taken)
    except CurvatureError as error:
        rank_zero_info(f"{owner}: no curvature is written: {error}")
        return None


def announce(layers: list[MoELayer], batches: int, owner: str) -> None:
    """Before training: says what statistics will take.

    Raises:
        StatisticsError: Several processes train.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise StatisticsError(
            f"statistics_batches={batches} runs on one process, this run has {dist.get_world_size()}: leave it out, "
            "and collect statistics from the checkpoint afterwards (moe-precision quantize --statistics-batches)"
        )
    rank_zero_info(
        f"{owner}: after the last step, {batches} training batches run for the experts' statistics, which take "
        f"{memory_bytes(layers) / 1e6:,.1f} MB of memory and a file of {file_bytes(layers) / 1e6:,.1f} MB"
    )


def statistics_of_run(
    model: nn.Module, layers: list[MoELayer], steps: Iterable[Step], batches: int, owner: str
) -> ExpertStatistics | None:
    """Statistics from the first steps; None, with the reason logged, if they cannot be had. The model stays as it is.

    Args:
        model: The model, or what is around it.
        layers: Its layers.
        steps: Forward passes, of which as many run as there are batches asked for.
        batches: How many.
        owner: Name of the callback, for messages.
    """
    taken = 0

    def counted() -> Iterator[Step]:
        nonlocal taken
        for step in islice(steps, batches):
            taken += 1
            yield step

    try:
        with left_as_it_is(model):
            found = collect_from_steps(model, layers, counted())
    except StatisticsError as error:
        rank_zero_warn(f"{owner}: no statistics are written: {error}")
        return None
    if taken < batches:
        rank_zero_warn(f"{owner}: there are {taken} batches to take statistics from, of {batches}.")
    found.text = f"{taken} training batches of the run that the plan is of"
    rank_zero_info(f"{owner}: {found.described()}")
    return found


def takes(model: nn.Module, batch: Any) -> bool:
    """Whether a batch is the keyword arguments of a transformers model."""
    if not (isinstance(root_model(model), PreTrainedModel) and isinstance(batch, Mapping)):
        return False
    return set(batch) <= set(inspect.signature(root_model(model).forward).parameters)
