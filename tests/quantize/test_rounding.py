"""Rounding under the second moment of the inputs, against textbook loops and brute force."""

import numpy as np
import pytest
import torch

from moe_precision.quantize.codec.columns import Grid, fit_columns
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.codec.rounding import check_moment, feedback_factor, half_gain
from moe_precision.quantize.codec.scales import stored_scales
from moe_precision.quantize.codec.sweeps import descend, feedback, nearest

OUT, IN, GROUP = 24, 192, 32


def correlated_inputs(count: int = 2000, width: int = IN, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -1.5, width).unsqueeze(1)
    return torch.randn(count, width, generator=generator) @ mixing


def second_moment(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


@pytest.fixture
def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def moment():
    return check_moment(second_moment(correlated_inputs()), IN)


def fitted(weight: torch.Tensor, bits: int) -> Grid:
    """Scale and offset of a plain fit, transposed as `rounding` takes them."""
    _, scale, offset = quantize_matrix(weight, bits, GROUP)
    return Grid.of(scale.float().T.contiguous(), offset.float().T.contiguous(), bits)


def transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.T.contiguous()


def values(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Weights ``(out, in)`` of codes ``(in, out)``."""
    spread = [grid.repeat_interleave(len(codes) // len(grid), 0) for grid in (scale, offset)]
    return (codes * spread[0] + spread[1]).T


def errors(weight: torch.Tensor, quantized: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """``(q - v) H (q - v)^T`` of each row, float64."""
    difference = (quantized - weight).double()
    return ((difference @ moment.double()) * difference).sum(1)


def error(weight: torch.Tensor, quantized: tuple[torch.Tensor, ...], moment: torch.Tensor) -> float:
    codes, scale, offset = (one.float().T for one in quantized)
    return float(errors(weight, values(codes, scale, offset), moment).sum())


def test_feedback_against_a_textbook_loop(weight, moment):
    """GPTQ as published: after each column, Gaussian elimination of the inverse and an update of all later columns."""
    grid = fitted(weight, 2)
    order, factor = feedback_factor(moment)
    codes = feedback(transposed(weight), grid, order, factor)

    h = moment.double().numpy()
    columns = np.argsort(-np.diag(h), kind="stable")
    inverse = np.linalg.inv(h[np.ix_(columns, columns)] + 0.01 * np.mean(np.diag(h)) * np.eye(IN))
    left = weight.double().numpy()[:, columns].copy()
    expected = np.empty((OUT, IN))
    for j, column in enumerate(columns):
        s, o = (one[column // GROUP].double().numpy() for one in (grid.scale, grid.offset))
        expected[:, column] = np.clip(np.rint((left[:, j] - o) / s), 0, 3)
        wrong = left[:, j] - (expected[:, column] * s + o)
        left[:, j:] -= np.outer(wrong / inverse[j, j], inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert (codes.T.numpy() == expected).mean() > 0.999  # float32 against float64: ties at most
    assert np.argsort(-np.diag(h), kind="stable").tolist() == order.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_descent_never_raises_the_error_and_ends_where_no_code_can_move(weight, moment, bits):
    grid = fitted(weight, bits)
    start = nearest(transposed(weight), grid)
    before = errors(weight, values(start, grid.scale, grid.offset), moment)
    (one, _), (end, _) = (descend(transposed(weight), start, grid, moment, sweeps) for sweeps in (1, 100))
    after_one, after = (errors(weight, values(codes, grid.scale, grid.offset), moment) for codes in (one, end))
    assert (after_one <= before * (1 + 1e-5)).all()
    assert (after <= after_one * (1 + 1e-5)).all()
    assert after.sum() < 0.5 * before.sum()
    for column in range(0, IN, 7):  # by brute force: no other code of a single column is better
        for code in range(2**bits):
            other = end.clone()
            other[column] = code
            assert (errors(weight, values(other, grid.scale, grid.offset), moment) >= after * (1 - 1e-4)).all()


@pytest.mark.parametrize("group", [16, 96, 192])  # several in a block of columns, one, and one of two
def test_sweeps_that_refit_never_raise_the_error(weight, moment, group):
    _, *scales = quantize_matrix(weight, 2, group)
    grid = Grid.of(*(transposed(one.float()) for one in scales), 2)
    codes = nearest(transposed(weight), grid)
    last = errors(weight, values(codes, grid.scale, grid.offset), moment)
    kept = codes.clone(), grid.scale.clone()
    for sweeps in (1, 2, 4):
        found, on = descend(transposed(weight), codes, grid, moment, sweeps, refits=sweeps)
        after = errors(weight, values(found, on.scale, on.offset), moment)
        assert (after < last * (1 + 1e-4)).all()
        last = after
    assert torch.equal(on.inverse, 1 / on.scale)
    assert torch.equal(codes, kept[0])
    assert torch.equal(grid.scale, kept[1])


def refitted(weight, codes, grid: Grid, moment, group: int, **keywords) -> Grid:
    """The grid after one group's scales and offsets were fitted; checks what else is returned and changed."""
    columns, on = slice(group * GROUP, (group + 1) * GROUP), grid.clone()
    before = (values(codes, grid.scale, grid.offset) - weight).T.contiguous()
    errors = before[columns].clone()
    own = moment[columns, columns]
    rest = transposed(weight)[columns], codes[columns], errors, (moment @ before)[columns], own, on, group
    change = fit_columns(*rest, **keywords)
    after = (values(codes, on.scale, on.offset) - weight).T
    torch.testing.assert_close(errors, after[columns], rtol=0, atol=1e-6)
    torch.testing.assert_close(change, (after - before)[columns], rtol=0, atol=1e-6)
    assert torch.equal(on.inverse[group], 1 / on.scale[group])
    return on


def test_a_refit_against_brute_force_least_squares(weight, moment):
    grid = fitted(weight[:, :GROUP], 3)  # one group: one step is the solution
    codes, own = nearest(transposed(weight[:, :GROUP]), grid), moment[:GROUP, :GROUP]
    found = refitted(weight[:, :GROUP], codes, grid, own, 0, ridge=0.0)
    root = torch.linalg.cholesky(own.double()).T
    for row in range(OUT):
        design = root @ torch.stack([codes[:, row], torch.ones(GROUP)], dim=1).double()
        solution = torch.linalg.lstsq(design, root @ weight[row, :GROUP].double()).solution
        ours = torch.stack([found.scale[0, row], found.offset[0, row]]).double()
        torch.testing.assert_close(ours, solution, atol=1e-3, rtol=1e-3)


def test_a_refit_keeps_scales_positive(weight, moment):
    grid = fitted(weight, 1)
    codes = 1 - nearest(transposed(weight), grid)  # the wrong way round: the best scale is negative
    for group in range(IN // GROUP):
        assert (refitted(weight, codes, grid, moment, group).scale > 0).all()


def test_the_gain(weight, moment):
    grid = fitted(weight, 1)
    codes = nearest(transposed(weight), grid)
    quantized, h = values(codes, grid.scale, grid.offset).double(), moment.double()
    whole = torch.einsum("ri,ij,rj->r", weight.double(), h, weight.double()) / torch.einsum(
        "ri,ij,rj->r", weight.double(), h, quantized
    )
    gain = half_gain(transposed(weight), codes, grid, moment)
    torch.testing.assert_close(gain.double().square(), whole, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_identity_gives_nearest_codes(weight, bits):
    codes, scale, offset = quantize_matrix(weight, bits, GROUP, second_moment=torch.eye(IN))
    expected = nearest(weight.T, Grid.of(scale.float().T, offset.float().T, bits)).T
    torch.testing.assert_close(codes.float(), expected, rtol=0, atol=0)
    torch.testing.assert_close((scale, offset), stored_scales(scale.float(), offset.float(), bits), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_less_error_than_a_fit_without(weight, bits, seed):
    moment = second_moment(correlated_inputs(seed=seed))
    columns = moment.diagonal()
    today = error(weight, quantize_matrix(weight, bits, GROUP, columns), moment)
    assert error(weight, quantize_matrix(weight, bits, GROUP, columns, moment), moment) < 0.6 * today


def test_rows_in_chunks_and_other_dtypes(weight, monkeypatch):
    moment = second_moment(correlated_inputs())
    weight = weight.repeat(12, 1).bfloat16()
    whole = quantize_matrix(weight, 2, GROUP, second_moment=moment)
    monkeypatch.setattr("moe_precision.quantize.codec.rounding._CHUNK", IN * 128)
    chunked = quantize_matrix(weight, 2, GROUP, second_moment=moment * 1e-12)  # its scale does not matter either
    assert error(weight.float(), chunked, moment) == pytest.approx(error(weight.float(), whole, moment), rel=1e-3)
    assert (chunked[0] == whole[0]).float().mean() > 0.99


def test_inputs_that_are_always_zero(weight):
    inputs = correlated_inputs()
    inputs[:, ::5] = 0
    moment = second_moment(inputs)
    quantized = quantize_matrix(weight, 2, GROUP, second_moment=moment)
    assert all(one.float().isfinite().all() for one in quantized)
    assert error(weight, quantized, moment) < 0.6 * error(weight, quantize_matrix(weight, 2, GROUP), moment)


def test_constant_groups(weight):
    weight[:, :GROUP] = 0.5
    weight[3] = 0
    codes, scale, offset = quantize_matrix(weight, 2, GROUP, second_moment=second_moment(correlated_inputs()))
    assert codes.max() <= 3
    assert scale.isfinite().all()
    assert offset.isfinite().all()
    row = values(codes.float().T, scale.float().T, offset.float().T)[3]
    assert row.abs().max() < 0.05


def test_descent_alone_where_there_is_no_factor(weight, monkeypatch):
    width = 1024  # half precision can make eigenvalues below 0 of zeros, which are small beside the largest
    assert feedback_factor(torch.ones(width, width) - 0.5 * torch.eye(width)) is None
    moment = second_moment(correlated_inputs())
    whole = error(weight, quantize_matrix(weight, 2, GROUP, second_moment=moment), moment)
    monkeypatch.setattr("moe_precision.quantize.codec.rounding.feedback_factor", lambda moment: None)
    alone = error(weight, quantize_matrix(weight, 2, GROUP, second_moment=moment), moment)
    assert whole < alone < 0.8 * error(weight, quantize_matrix(weight, 2, GROUP), moment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:-1], r"has shape \(191, 192\), expected \(192, 192\)"),
        (lambda m: m.index_fill(0, torch.tensor([2]), float("nan")), "holds 192 values that are not finite"),
        (lambda m: m - 1.01 * m.diagonal()[3] * torch.eye(IN), r"a diagonal from -\d.*expected mean squares"),
        (lambda m: 0 * m, "a diagonal from 0 to 0"),
        (lambda m: m + 0.5 * m.diagonal().max() * torch.ones(IN, IN).triu(1), "differs from its transpose by 50.00%"),
        (lambda m: 2 * m - torch.diag(m.diagonal()), r"has eigenvalues from -\d.*expected none below 0"),
    ],
)
def test_what_is_no_second_moment(weight, change, message):
    with pytest.raises(ValueError, match=message):
        quantize_matrix(weight, 2, GROUP, second_moment=change(second_moment(correlated_inputs())))
