"""Curvature of a run, from its optimizer or from training batches after the last step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_precision.layers.module_tree import root_model
from moe_precision.layers.moe_layers import MoELayer
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.gradients import curvature_of_losses, left_as_it_is
from moe_precision.recording.second_moments import curvature_of

Loss = Callable[[], Tensor | None]  # of one batch


class Gradients(NamedTuple):
    """Of how many batches squared gradients are taken; None reads the optimizer. Unasked, fewer are no surprise."""

    batches: int | None
    asked: bool = True


def curvature_of_run(
    model: nn.Module,
    layers: list[MoELayer],
    optimizers: Sequence[Any],
    losses: Iterable[Loss],
    gradients: Gradients,
    owner: str,
) -> Curvature | None:
    """Means of the optimizer's second moments, or of squared gradients of the first losses where those are asked for.

    Args:
        model: The model, or what is around it.
        layers: Its layers.
        optimizers: That have trained the experts.
        losses: Of training batches.
        gradients: Of how many losses to take gradients.
        owner: Name of the callback, for messages.
    """
    batches = gradients.batches
    try:
        if batches is None:
            return curvature_of(layers, optimizers)
        with left_as_it_is(model):
            taken = list(islice(losses, batches))
            if len(taken) < batches and gradients.asked:
                rank_zero_warn(f"{owner}: only {len(taken)} batches to take gradients on.")
            return curvature_of_losses(layers, taken)
    except CurvatureError as error:
        rank_zero_info(f"{owner}: no curvature is written: {error}")
        return None


def takes(model: nn.Module, batch: Any) -> bool:
    """Whether a batch is the keyword arguments of a transformers model."""
    if not (isinstance(root_model(model), PreTrainedModel) and isinstance(batch, Mapping)):
        return False
    return set(batch) <= set(inspect.signature(root_model(model).forward).parameters)
