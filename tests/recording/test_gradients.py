"""Curvature from the gradients of losses, against gradients taken by hand."""

import pytest
import torch

from moe_precision import find_moe_layers
from moe_precision.recording.curvature import CurvatureError
from moe_precision.recording.gradients import curvature_of_losses
from tests.support.models import build
from tests.support.optimizers import losses_of


@pytest.mark.parametrize("frozen", [False, True])
def test_squared_gradients_by_hand(frozen):
    model = build("mixtral")
    layers = find_moe_layers(model)
    experts = model.model.layers[1].mlp.experts
    if frozen:
        experts.down_proj.requires_grad_(False)
    found = curvature_of_losses(layers, losses_of(model, 3))
    assert experts.down_proj.grad is None
    assert experts.down_proj.requires_grad != frozen
    experts.down_proj.requires_grad_(True)
    squares = [torch.autograd.grad(loss(), experts.down_proj)[0].square() for loss in losses_of(model, 3)]
    mean = torch.stack(squares).mean(0)  # (E, out, in)
    torch.testing.assert_close(found.rows[layers[1].name]["down_proj"], mean.mean(2))
    torch.testing.assert_close(found.columns[layers[1].name]["down_proj"], mean.mean(1))
    with pytest.raises(CurvatureError, match="no batch"):
        curvature_of_losses(layers, [])


def test_experts_without_a_token_in_the_batches_count_as_zero():
    model = build("switch_transformers")
    layers = find_moe_layers(model)
    ids = torch.full((1, 3), 5)
    found = curvature_of_losses(layers, [lambda: model(input_ids=ids, labels=ids).loss])
    rows = found.rows[layers[0].name]["wi"].sum(1)  # (E,)
    assert (rows > 0).sum() == 1  # the same token three times
    assert (rows == 0).sum() == 7
