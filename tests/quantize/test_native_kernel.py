"""The kernel in C++: how it is checked, on which CPUs, and products that are hard to get right."""

import platform
from pathlib import Path

import pytest
import torch

from moe_precision.quantize import kernels
from moe_precision.quantize.codec.packing import pack
from moe_precision.quantize.kernels import Matrices, compiler, native
from moe_precision.quantize.kernels.native import Native
from tests.support.packed import bucket, compile_for, use


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """Nothing is compiled yet, here or in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "moe_precision"
    native.library.cache_clear()


@pytest.fixture
def unoptimized(monkeypatch):
    """A compiler that is done in a second, for tests of everything but the code that it makes."""
    monkeypatch.setattr(compiler, "_FLAGS", ["-O0" if flag == "-O3" else flag for flag in compiler._FLAGS])


@pytest.mark.parametrize(
    ("compiler_is", "reason"),
    [("", "no C"), ("no-such-compiler", "no C"), ("false", "exit status 1"), ("true", "No such file")],
)
def test_without_a_compiler_one_is_told(compiler_is, reason, no_library, monkeypatch):
    monkeypatch.setenv("CXX", compiler_is)
    with pytest.warns(UserWarning, match=rf"({reason}).*install a C\+\+ compiler"):
        assert native.library() is None
    assert native.library() is None  # once
    assert kernels.choose(kernels.Request("cpu", torch.float32, False, 2, 64, 256, 128)) is None


@pytest.mark.slow
def test_a_kernel_that_miscalculates_is_not_taken(no_library, unoptimized, monkeypatch, tmp_path):
    wrong = tmp_path / "native.cpp"
    text = native._SOURCE.read_text()
    assert text.count("return pair * BITS;") == 1
    wrong.write_text(text.replace("return pair * BITS;", "return pair * BITS + 1;"))
    monkeypatch.setattr(native, "_SOURCE", wrong)
    with pytest.warns(UserWarning, match="wrong products at 1 bits"):
        assert native.library() is None


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other names of CPUs")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_older_cpus(cpu, no_library, unoptimized, monkeypatch):
    """SSE2, AVX2, and AVX-512 without bfloat16: the check after compiling is of every width and both dtypes."""
    compile_for(cpu, monkeypatch)
    library = native.library()
    assert library.lanes() == {"x86-64": 4, "x86-64-v3": 8, "x86-64-v4": 16}[cpu]
    assert not library.knows_bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_depends_on_nothing_else(dtype, monkeypatch):
    """Products depend neither on other tokens nor on the number of threads."""
    use(monkeypatch, Native)
    matrices, x = bucket(3, 64), torch.randn(37, 192).to(dtype)
    expected, threads = matrices.linear(0, x), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for first, last in ((0, 1), (1, 3), (4, 9), (9, 26), (0, 37)):
                assert torch.equal(matrices.linear(0, x[first:last]), expected[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_activation_that_meets_code_0(dtype, monkeypatch):
    """The bfloat16 form of one code must not drown the others."""
    use(monkeypatch, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    codes = torch.randint(0, 4, (2, 48, 192), dtype=torch.uint8)
    codes[..., 5] = 0
    flat = torch.ones(matrices.scale.shape).half()
    for held, new in zip(matrices.held(), Matrices.of(pack(codes, 2), flat, flat * 0), strict=True):
        held.copy_(new)
    x[:, 5] = 1e4
    x = x.to(dtype)
    expected = x.float() @ matrices.weight(0).T
    assert (matrices.linear(0, x).float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_are_no_numbers_stay_so(dtype, monkeypatch):
    use(monkeypatch, Native)
    for value in (float("inf"), float("-inf"), float("nan")):
        matrices = bucket(2, 64)
        matrices.ends.fill_(value)
        assert not matrices.weight(0).isfinite().any()
        assert not matrices.linear(0, torch.randn(3, 192).to(dtype)).isfinite().any()


def test_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="no home; name a folder in XDG_CACHE_HOME"):
        assert native.library() is None
    native.library.cache_clear()


def test_the_smallest_scales(monkeypatch):
    """Subnormal float16 numbers, where the CPU is told to flush subnormal numbers."""
    use(monkeypatch, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    tiny = torch.full(matrices.scale.shape, 2.0**-24)
    for held, new in zip(matrices.held(), Matrices.of(matrices.codes, tiny.half(), tiny.half() * 3), strict=True):
        held.copy_(new)
    expected = x @ matrices.weight(0).T
    assert expected.norm() > 0
    flushed = torch.set_flush_denormal(True)
    try:
        torch.testing.assert_close(matrices.linear(0, x), expected, atol=0, rtol=1e-3)
    finally:
        torch.set_flush_denormal(False)
    assert flushed
