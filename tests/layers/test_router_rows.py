"""The norm of router rows, as rows and as columns, by hand."""

import pytest
import torch

from moe_precision.layers.router_rows import router_row_norms
from moe_precision.recording.signals import router_norm_change

ROWS = torch.tensor([[3.0, 4.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 6.0, 8.0, 0.0]])  # (3, 4): norms 5, 4, 10


def test_rows_and_columns():
    assert router_row_norms(ROWS, num_experts=3).tolist() == [5.0, 4.0, 10.0]
    assert router_row_norms(ROWS.T, num_experts=3, transposed=True).tolist() == [5.0, 4.0, 10.0]
    square = ROWS[:, :3]  # a shape that says nothing
    assert router_row_norms(square, num_experts=3)[2] == 10.0
    assert router_row_norms(square, num_experts=3, transposed=True)[2] == pytest.approx(68**0.5)  # 0, 2, 8


def test_rows_of_null_experts_are_left_out():
    assert router_row_norms(ROWS, num_experts=2).tolist() == [5.0, 4.0]
    assert router_row_norms(ROWS.T.contiguous(), num_experts=2, transposed=True).tolist() == [5.0, 4.0]


def test_norms_are_float32_whatever_the_dtype():
    assert router_row_norms(ROWS.bfloat16(), num_experts=3).dtype == torch.float32
    large = torch.full((1, 4), 3e4, dtype=torch.float16)  # whose squares float16 cannot hold
    assert router_row_norms(large, num_experts=1).item() == pytest.approx(6e4, rel=1e-3)


@pytest.mark.parametrize(
    ("weight", "transposed", "message"),
    [
        (ROWS, False, r"shape \(3, 4\), expected \(rows, d\) with at least 4 rows"),
        (ROWS.T, True, r"shape \(4, 3\), expected \(d, rows\) with at least 4 rows"),
        (ROWS.flatten(), False, r"shape \(12,\), expected \(rows, d\)"),
    ],
)
def test_what_has_too_few_rows(weight, transposed, message):
    with pytest.raises(ValueError, match=message):
        router_row_norms(weight, num_experts=4, transposed=transposed)


def test_a_change_is_a_difference_of_norms():
    assert router_norm_change(ROWS, ROWS.flip(0)).tolist() == [5.0, 0.0, -5.0]
