"""Signals against values worked out by hand."""

import pytest
import torch

from moe_precision.signals import max_variance, router_norm_change


def test_change_is_a_signed_difference_of_norms():
    first = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    last = torch.tensor([[0.0, 5.0], [0.0, 1.0], [3.0, 4.0]])
    # norms 5, 2, 1 -> 5, 1, 5; a norm of the difference would give sqrt(10), 1, sqrt(20)
    assert router_norm_change(first, last).tolist() == [0.0, -1.0, 4.0]


def test_change_is_float32_for_bfloat16_weights():
    weight = torch.ones(2, 1000, dtype=torch.bfloat16)
    change = router_norm_change(torch.zeros_like(weight), weight)
    assert change.dtype == torch.float32
    torch.testing.assert_close(change, torch.full((2,), 1000**0.5))


def test_change_wants_equal_shapes():
    with pytest.raises(ValueError, match="one shape"):
        router_norm_change(torch.ones(2, 3), torch.ones(3, 3))


def test_max_variance_is_the_population_variance_of_the_worst_row():
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0], [4.0, 6.0, 4.0, 6.0]])
    assert max_variance(weight).item() == 1.0  # rows: 0, 1, 1; the sample variance would be 4/3
