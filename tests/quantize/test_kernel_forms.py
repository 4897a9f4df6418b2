"""The form that packed matrices are in: it follows dtypes, new weights, gradients, modes and pickles."""

import copy
import pickle

import pytest
import torch

from moe_precision.quantize.kernels.int4 import Int4
from moe_precision.quantize.kernels.native import Native
from tests.support.packed import bucket, use


def test_the_form_follows_dtype_and_new_weights(monkeypatch, any_cpu):
    use(monkeypatch, Int4, Native)
    matrices, x = bucket(4, 64), torch.randn(3, 192)
    first = matrices.linear(0, x.bfloat16())
    assert isinstance(matrices.kernel, Int4)
    assert (matrices.linear(0, x) - first.float()).norm() / first.float().norm() < 0.01
    assert isinstance(matrices.kernel, Native)
    state = copy.deepcopy(matrices.state_dict())
    matrices.put([0], torch.randn(1, 48, 192))
    assert not torch.equal(matrices.linear(0, x.bfloat16()), first)
    matrices.load_state_dict(state)
    assert torch.equal(matrices.linear(0, x.bfloat16()), first)


def test_gradients_pass(monkeypatch, any_cpu):
    use(monkeypatch, Int4, Native)
    matrices = bucket(4, 64)
    x = torch.randn(3, 192, requires_grad=True)
    matrices.linear(1, x).sum().backward()
    torch.testing.assert_close(x.grad, matrices.weight(1).sum(0).expand(3, -1))


@pytest.mark.parametrize("kernel", [Int4, Native])
def test_inputs_of_other_shapes(kernel, monkeypatch, any_cpu):
    use(monkeypatch, kernel)
    matrices = bucket(4, 64)
    weight = matrices.weight(0)
    x = torch.randn(192, 6).bfloat16()
    for odd in (x.T, x.T[:0], x.T[None, :, :], x.T[::2], x.T.new_zeros(2, 0, 192)):
        product, exact = matrices.linear(0, odd), odd.float() @ weight.T
        assert product.shape == exact.shape
        assert (product.float() - exact).norm() <= 0.01 * exact.norm()
    assert isinstance(matrices.kernel, kernel)


def test_as_many_matrices_as_rows(monkeypatch, any_cpu):
    use(monkeypatch, Native)
    matrices = bucket(2, 32, count=32, out=32, inp=64)
    weight, x = matrices.weight(31), torch.randn(2, 64)
    torch.testing.assert_close(matrices.linear(31, x), x @ weight.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernel", [Int4, Native])
def test_what_is_made_in_inference_mode_outlives_it(kernel, monkeypatch, any_cpu):
    use(monkeypatch, kernel)
    matrices, x = bucket(4, 64), torch.randn(3, 192).bfloat16()
    with torch.inference_mode():
        before = matrices.linear(0, x).clone()
        state = copy.deepcopy(matrices.state_dict())
    matrices.load_state_dict(state)
    matrices.put([1], torch.randn(1, 48, 192))
    assert torch.equal(matrices.linear(0, x), before)


def test_a_pickle_holds_the_checkpoints_form(monkeypatch, any_cpu):
    """torch's int4 order depends on the CPU: a pickle must not carry it to another one."""
    use(monkeypatch, Int4)
    matrices, x = bucket(4, 64), torch.randn(3, 192).bfloat16()
    expected = matrices.linear(0, x)
    again = pickle.loads(pickle.dumps(matrices))
    assert again.kernel is None
    assert torch.equal(again.codes, matrices.codes)
    assert torch.equal(again.linear(0, x), expected)


def test_training_keeps_its_kernel(monkeypatch, any_cpu):
    """Gradient checkpointing runs forward without gradients and once more with them."""
    use(monkeypatch, Int4, Native)
    matrices, x = bucket(4, 64), torch.randn(3, 192).bfloat16()
    matrices.linear(0, x.clone().requires_grad_())
    kernel = matrices.kernel
    matrices.linear(0, x)
    assert matrices.kernel is kernel
    assert isinstance(kernel, Native)
