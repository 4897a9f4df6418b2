"""Products with activations in int8: exactly those of the rounded activations, and only where they are wanted."""

import copy

import pytest
import torch

from moe_precision import allocate, quantize_model, set_activations
from moe_precision.quantize.kernels import native
from moe_precision.quantize.kernels.native import Native, NativeInt8, rounded
from tests.support.models import build, logits
from tests.support.packed import bucket, use

pytestmark = pytest.mark.skipif(
    native.library() is None or not native.library().most_bits_with_int8(), reason="no products in int8 here"
)


def test_rounding_by_hand():
    x = torch.tensor([[127.0, 0.5, 1.5, -127.0, 0.0, 0.0, 0.0, 0.0, -254.0, 3.0, 1.0, 5.0]])
    # groups of four: steps of 1, ties to even; nothing but zeros; steps of 2
    expected = [127.0, 0.0, 2.0, -127.0, 0.0, 0.0, 0.0, 0.0, -254.0, 4.0, 0.0, 4.0]
    assert rounded(x, 4).tolist() == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [8, 24, 64, 96])
def test_a_product_is_that_of_the_rounded_activations(bits, group_size, monkeypatch):
    use(monkeypatch, NativeInt8)
    matrices = bucket(bits, group_size)
    weight = matrices.weight(1)
    for tokens in (1, 2, 5, 16, 17, 41):  # from 17 on codes are unpacked once for several tiles
        x = torch.randn(tokens, 192)
        x[0, :group_size] = 0
        half = x.half()
        expected = rounded(half, group_size) @ weight.T
        product = matrices.linear(1, half).float()
        assert (product - expected).norm() <= 1e-3 * expected.norm()  # of float16
        assert type(matrices.kernel) is NativeInt8
        y = torch.empty(tokens, 48)
        starts = torch.tensor([0, tokens])
        _, *parts = matrices.kernel.form
        form = native.Words(bits, *(part[1:] for part in parts))
        experts = starts[:1]
        native.multiply(native.library(), [(form, experts)], group_size, x, starts, y, in_int8=True)
        expected = rounded(x, group_size) @ weight.T
        assert (y - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_depends_on_nothing_else(dtype, monkeypatch):
    use(monkeypatch, NativeInt8)
    matrices, x = bucket(3, 64), torch.randn(37, 192).to(dtype)
    expected, threads = matrices.linear(0, x), torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for first, last in ((0, 1), (1, 3), (4, 9), (9, 26), (0, 37)):
                assert torch.equal(matrices.linear(0, x[first:last]), expected[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad, monkeypatch):
    use(monkeypatch, NativeInt8)
    matrices, x = bucket(2, 64), torch.randn(3, 192).bfloat16()
    expected = matrices.linear(1, x)
    x[1, 70] = bad
    found = matrices.linear(1, x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.slow
def test_activations_as_they_are(monkeypatch):
    use(monkeypatch, NativeInt8, Native)
    model = build("mixtral").bfloat16()
    packed = quantize_model(model, allocate(model, method="uniform", average_bits=2, group_size=64))
    by_itself = logits(packed)
    assert {text.split(",")[0] for text in packed.moe_precision_kernels().values()} == {"C++ in int8"}
    exact = copy.deepcopy(packed)
    set_activations(exact, "bfloat16")
    assert {text.split(",")[0] for text in exact.moe_precision_kernels().values()} == {"C++"}
    assert not torch.equal(logits(exact), by_itself)
    assert (logits(exact) - by_itself).norm() < 0.05 * by_itself.norm()
    set_activations(exact, "int8")
    assert {text.split(",")[0] for text in exact.moe_precision_kernels().values()} == {"C++ in int8"}
    assert torch.equal(logits(exact), by_itself)


def test_nothing_is_rounded_in_float32(monkeypatch):
    use(monkeypatch, NativeInt8, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    torch.testing.assert_close(matrices.linear(0, x), x @ matrices.weight(0).T, atol=1e-4, rtol=1e-4)
    assert type(matrices.kernel) is Native


def test_other_values_and_a_float_model():
    with pytest.raises(ValueError, match="activations='int4': expected one of int8, bfloat16"):
        set_activations(build("mixtral"), "int4")
    with pytest.raises(ValueError, match="nothing in this MixtralForCausalLM is packed"):
        set_activations(build("mixtral"), "int8")
