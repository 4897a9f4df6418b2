"""Signals against values worked out by hand."""

import pytest
import torch

from moe_precision.recording.signals import max_variance, router_norm_change


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 0.02, 1.0])
def test_max_variance_against_double_precision(dtype, mean):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(700, 300, generator=generator) * 0.02 + mean).to(dtype)
    weight[500] += 3 * mean  # the largest mean square, and not the largest variance
    expected = weight.double().var(dim=1, correction=0).max().float()
    torch.testing.assert_close(max_variance(weight), expected, rtol=1e-4, atol=0)


def test_max_variance_of_a_damaged_matrix_is_not_a_number():
    weight = torch.randn(4, 8)
    weight[2, 3] = float("nan")
    assert max_variance(weight).isnan()
