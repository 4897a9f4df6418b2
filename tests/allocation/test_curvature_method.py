"""Plans by curvature: better on a trained model, and clear about the fit that they are made for."""

import copy

import pytest
import torch

from moe_precision import AllocationError, allocate, find_moe_layers, quantize_model
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build
from tests.support.optimizers import trained_with


@pytest.mark.slow
def test_curvature_lowers_the_loss(trained):
    """On a trained model: the fit at 2 bits, and the choice at 2.5, by loss on held-out text."""
    model, blocks = trained

    def loss(model):
        with torch.no_grad():
            return sum(model(input_ids=part, labels=part).loss.item() for part in blocks[:128].split(64)) / 2

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)  # weights stay, moments are taken
    model.train()
    for part in blocks[:128].split(16):
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    model.zero_grad()
    model.eval()
    curvature = curvature_of(find_moe_layers(model), [optimizer])
    base = loss(model)

    def increase(plan, fit=None):
        return loss(quantize_model(copy.deepcopy(model), plan, curvature=fit)) - base

    uniform = allocate(model, method="uniform", average_bits=2, group_size=64)
    assert increase(uniform, curvature) < increase(uniform)
    chosen = allocate(model, method="curvature", curvature=curvature, bits=(1, 2, 3, 4), group_size=64)
    assert chosen.average_bits <= 2.5
    random = [increase(allocate(model, method="random", seed=seed, group_size=64), curvature) for seed in range(3)]
    assert increase(chosen, curvature) < min(random)


@pytest.mark.slow
def test_a_plan_by_curvature_without_its_weights_warns():
    model = build("mixtral")
    curvature = curvature_of(find_moe_layers(model), [trained_with(torch.optim.AdamW, model)])
    plan = allocate(model, method="curvature", curvature=curvature, group_size=64, stored_bits=2.75)
    assert plan.stored_bits <= 2.75
    assert plan.settings.stored_bits == 2.75
    with pytest.warns(UserWarning, match="the fit is unweighted now"):
        quantize_model(model, plan)
    with pytest.raises(AllocationError, match="outside what the levels"):
        allocate(build("mixtral"), method="weight_error", group_size=64, stored_bits=1.2)
