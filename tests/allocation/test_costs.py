"""What a width costs, by hand."""

import pytest
import torch

from moe_precision.allocation.costs import curvature_cost, weight_error


def test_the_cost_by_hand():
    weight, quantized = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    v = torch.tensor([[1.0, 3.0], [2.0, 6.0]])  # a product of rows 2, 4 and columns 1.5, 4.5 over the mean 3
    assert weight_error(weight, quantized).item() == 14.0
    expected = 0.5 * (1 * 1 + 3 * 4 + 6 * 9)
    assert curvature_cost(weight, quantized, v.mean(1), v.mean(0)).item() == pytest.approx(expected)
    assert curvature_cost(weight, quantized, torch.zeros(2), torch.zeros(2)).item() == 0.0
