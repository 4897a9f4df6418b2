"""What a width costs, by hand."""

import pytest
import torch

from moe_precision.allocation.costs import curvature_cost, shuffled_costs, weight_error


def test_the_cost_by_hand():
    weight, quantized = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    v = torch.tensor([[1.0, 3.0], [2.0, 6.0]])  # a product of rows 2, 4 and columns 1.5, 4.5 over the mean 3
    assert weight_error(weight, quantized).item() == 14.0
    expected = 0.5 * (1 * 1 + 3 * 4 + 6 * 9)
    assert curvature_cost(weight, quantized, v.mean(1), v.mean(0)).item() == pytest.approx(expected)
    assert curvature_cost(weight, quantized, torch.zeros(2), torch.zeros(2)).item() == 0.0


def test_shuffled_costs_move_whole_experts_within_their_layer():
    up = torch.arange(16, dtype=torch.float64).view(8, 2)
    costs = {"0": {"up": up, "down": up * 10}, "1": {"up": up, "down": up * 10}}
    shuffled = shuffled_costs(costs, seed=0)
    assert costs["0"]["up"] is up  # left as it was
    for layer in shuffled.values():
        assert not layer["up"].equal(up)
        assert layer["down"].equal(layer["up"] * 10)  # a whole expert moves
        assert layer["up"][layer["up"][:, 0].argsort()].equal(up)  # none is lost
    assert not shuffled["0"]["up"].equal(shuffled["1"]["up"])
    assert shuffled_costs(costs, seed=0)["1"]["up"].equal(shuffled["1"]["up"])
    assert not shuffled_costs(costs, seed=1)["0"]["up"].equal(shuffled["0"]["up"])
