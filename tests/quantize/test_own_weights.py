"""Curvature and grid fit the weights that they were measured on, however the router is stored, and no others."""

import copy

import pytest
import torch
from torch import nn

from moe_precision import allocate, find_moe_layers, quantize_model
from moe_precision.annealing.hooks import GridHooks
from moe_precision.quantize.codec.grid import Grid, GridError
from moe_precision.quantize.modules import PackedLinear
from moe_precision.recording.curvature import CurvatureError
from moe_precision.recording.gradients import curvature_of_losses
from tests.support.models import PlainMoE

PATTERN = r"^w_gate$"


class ColumnRouterMoE(PlainMoE):
    """A router ``(d, E)``, with a column for each expert."""

    def __init__(self):
        super().__init__(router=False)  # d = 32, E = 4
        self.w_gate = nn.Parameter(torch.randn(32, 4))

    def router(self, x):
        return x @ self.w_gate


def measured(model):
    """A plan of 3 bits, curvature, and a grid that the weights are put on."""
    layers = find_moe_layers(model, router_pattern=PATTERN)
    curvature = curvature_of_losses(layers, [lambda: model(torch.randn(256, 32)).square().mean()])
    settings = {"method": "uniform", "average_bits": 3, "bits": (3,), "group_size": 32}
    plan = allocate(model, router_pattern=PATTERN, **settings)
    hooks = GridHooks(layers, Grid.fit(layers, plan))
    hooks.settle()
    hooks.close()
    return plan, curvature, hooks.grid


def changed(model):
    """A copy with one column of the router three times as long."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.w_gate[:, 1] *= 3
    return other


def test_a_router_with_a_column_for_each_expert():
    torch.manual_seed(0)
    moe = ColumnRouterMoE()
    plan, curvature, grid = measured(moe)
    torch.testing.assert_close(next(iter(curvature.router_norms.values())), moe.w_gate.norm(dim=0).detach())
    for given in ({"curvature": curvature}, {"grid": grid}):
        packed = quantize_model(copy.deepcopy(moe), plan, **given)
        assert isinstance(packed.experts[3][0], PackedLinear)
    with pytest.raises(CurvatureError, match="the curvature belongs to other weights"):
        quantize_model(changed(moe), plan, curvature=curvature)
    with pytest.raises(GridError, match="the grid belongs to other weights"):
        quantize_model(changed(moe), plan, grid=grid)
