"""A small model with all that a plan with 0 bits is made from."""

import torch

from moe_precision import collect_statistics, find_moe_layers
from moe_precision.recording.gradients import curvature_of_losses
from tests.support.models import build


def observed(family, batches=8, **changes):
    """A model, keywords for `allocate`, and batches; curvature and statistics are of these batches."""
    torch.manual_seed(0)
    model = build(family, **changes)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 128, (batches, 4, 32))]
    statistics = collect_statistics(model, data)
    curvature = curvature_of_losses(find_moe_layers(model), [lambda batch=b: model(**batch).loss for b in data])
    model.zero_grad()
    return model, {"statistics": statistics, "curvature": curvature, "group_size": 32}, data
