"""The kernel for rounding column by column: the bits of torch, with and without a compiler."""

import platform
from pathlib import Path

import pytest
import torch

from moe_precision.quantize.codec import columns
from moe_precision.quantize.codec.columns import Grid
from moe_precision.quantize.codec.fitting import quantize_matrix
from tests.quantize.test_rounding import correlated_inputs, error, second_moment
from tests.support.packed import compile_for


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """Nothing is compiled yet, here or in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    columns.library.cache_clear()
    yield tmp_path / "moe_precision"
    columns.library.cache_clear()


def block(count: int, rows: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Grid]:
    """The arguments of `columns.round_columns`: three groups of a matrix, one of them constant in some rows."""
    random = torch.Generator().manual_seed(count + rows + bits)
    weight, left = torch.randn(2, count, rows, generator=random)
    factor = torch.randn(count, 3 * count, generator=random)[:, count : 2 * count] / count  # part of a larger matrix
    scale = torch.rand(3, rows, generator=random) * 2 / 2**bits
    scale[1, ::5] = 0
    return weight, left, factor, torch.arange(count) % 3, Grid.of(scale, -scale * 2 ** (bits - 1), bits)


def a_weight(rows: int) -> torch.Tensor:
    return torch.randn(rows, 192, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 63), (64, 64), (128, 65), (32, 333)])
def test_the_same_bits_as_torch(count, rows, bits):
    if columns.library() is None:
        pytest.skip("no compiler")
    weight, left, factor, groups, grid = block(count, rows, bits)
    codes, errors = columns.round_columns(weight, left.clone(), factor, groups, grid)
    expected = columns._round(weight, left.clone(), factor, groups, grid)
    assert torch.equal(codes, expected[0])
    assert torch.equal(errors, expected[1])
    assert len(codes.unique()) > 1 or codes.numel() == 1
    assert ((codes >= 0) & (codes < 2**bits) & (codes == codes.round())).all()

    per_square = torch.rand(count, generator=torch.Generator().manual_seed(0))
    per_square[count // 2] = 0  # a column whose inputs are all zero
    rest = factor, per_square, grid.scale[1], grid.inverse[1], grid.top
    ours, theirs = codes.clone(), codes.clone()
    moved = columns.move_columns(ours, left.clone(), *rest)
    assert torch.equal(moved, columns._move(theirs, left.clone(), *rest))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[count // 2], codes[count // 2])
    assert torch.equal(moved, (ours - codes) * grid.scale[1])


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 63), (64, 130)])
def test_the_same_scales_as_torch(count, rows, bits):
    if columns.library() is None:
        pytest.skip("no compiler")
    weight, slope, _, groups, grid = block(count, rows, bits)
    codes, errors = columns.round_columns(weight, weight.clone(), torch.zeros(count, count), groups * 0, grid)
    root = torch.randn(count, count + 1, generator=torch.Generator().manual_seed(0))
    moment, found = root @ root.T, []
    for use in (lambda *rest: columns._fit_compiled(columns.library(), *rest), columns._fit):
        own, kept = grid.clone(), errors.clone()
        change = use(weight, codes, kept, slope, moment @ codes, moment.sum(), own, 0, 1e-3)
        found.append((change, kept, *own[:3]))
        assert torch.equal(own.scale[1:], grid.scale[1:])  # other groups stay
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert count == 1 or not torch.equal(own.scale[0], grid.scale[0])


def test_a_code_half_way_is_the_even_one():
    weight = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, 0.49999997]])
    one = torch.ones(1, 6)
    codes, _ = columns.round_columns(weight, weight, torch.ones(1, 1), torch.zeros(1).long(), Grid.of(one, 0 * one, 2))
    assert codes.tolist() == [[0, 2, 2, 3, 0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group", [32, 192])
def test_a_matrix_has_the_same_codes_with_and_without(bits, group, monkeypatch):
    weight, moment = a_weight(200), second_moment(correlated_inputs())
    compiled = quantize_matrix(weight, bits, group, second_moment=moment)
    monkeypatch.setattr(columns, "library", lambda: None)
    plain = quantize_matrix(weight, bits, group, second_moment=moment)
    assert all(map(torch.equal, compiled, plain))
    assert error(weight, compiled, moment) < 0.6 * error(weight, quantize_matrix(weight, bits, group), moment)


def test_any_number_of_threads():
    weight, left, factor, groups, grid = block(50, 700, 2)
    expected, threads = columns.round_columns(weight, left.clone(), factor, groups, grid), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert all(map(torch.equal, columns.round_columns(weight, left.clone(), factor, groups, grid), expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(("compiler_is", "reason"), [("no-such-compiler", "no C"), ("false", "exit status 1")])
def test_without_a_compiler_torch_rounds(compiler_is, reason, no_library, monkeypatch):
    monkeypatch.setenv("CXX", compiler_is)
    weight, moment = a_weight(40), second_moment(correlated_inputs())
    with pytest.warns(UserWarning, match=rf"longer.*({reason}).*install a C\+\+ compiler"):
        found = quantize_matrix(weight, 2, 32, second_moment=moment)
    assert error(weight, found, moment) < 0.6 * error(weight, quantize_matrix(weight, 2, 32), moment)
    assert columns.library() is None  # and says so once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("0x1.8p23f) -", "0x1.8p23f + 0x1.8p22f) -", "rounds otherwise"),
        ("code.v[i] - old.v[i]", "code.v[i]", "moves codes"),
        ("width.v[i] * 3.0f", "width.v[i] * 1.0f", "fits scales"),
    ],
)
def test_a_kernel_that_miscalculates_is_not_taken(right, wrong, message, no_library, monkeypatch, tmp_path):
    text = columns._SOURCE.read_text()
    assert text.count(right) == 1
    (tmp_path / "columns.cpp").write_text(text.replace(right, wrong))
    monkeypatch.setattr(columns, "_SOURCE", tmp_path / "columns.cpp")
    with pytest.warns(UserWarning, match=message):
        assert columns.library() is None


@pytest.mark.slow
def test_fused_products_are_other_bits(no_library, monkeypatch):
    """Why the kernel is compiled without them, on a CPU that has them."""
    if "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has none")
    monkeypatch.setattr(columns, "_FLAGS", ("-ffp-contract=fast",))
    with pytest.warns(UserWarning, match="otherwise than torch"):
        assert columns.library() is None


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other names of CPUs")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_older_cpus(cpu, no_library, monkeypatch):
    """SSE2, AVX2 and AVX-512: the check after compiling compares them with torch."""
    compile_for(cpu, monkeypatch)
    assert columns.library() is not None
    assert len(list(no_library.glob("columns-*.so"))) == 1
