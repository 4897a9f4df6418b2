"""One projection of all experts: the rows of each expert times its matrix, with and without a kernel."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from moe_precision.quantize import matrices as packed_module
from moe_precision.quantize.kernels import native
from moe_precision.quantize.kernels.native import Native
from moe_precision.quantize.matrices import DenseMatrices, PackedMatrices
from tests.support.packed import bucket, mixed_projection, use


@pytest.mark.slow
def test_what_is_no_tensor_in_memory(monkeypatch):
    use(monkeypatch, Native)
    matrices, x = bucket(2, 64), torch.randn(3, 192)
    matrices.linear(0, x)
    projection, rows, starts, expected = mixed_projection()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(TypeError, match="plain tensors only, got Fake"):
            matrices.linear(0, mode.from_tensor(x))
        with pytest.raises(TypeError, match="plain tensors only, got Fake"):
            projection(mode.from_tensor(rows), starts)
    torch.testing.assert_close(projection(rows, starts), expected, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level(), pytest.raises(TypeError, match="plain tensors"):
        matrices.linear(0, forward_ad.make_dual(x, x))


@pytest.mark.parametrize("only", [(), (Native,)])
def test_a_projection(only, monkeypatch):
    use(monkeypatch, *only)
    projection, x, starts, expected = mixed_projection()
    torch.testing.assert_close(projection(x, starts), expected, atol=1e-5, rtol=1e-5)
    assert {type(bucket_of.kernel) for bucket_of in projection.children() if isinstance(bucket_of, PackedMatrices)} == {
        *(only or [type(None)])
    }
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(projection(strided, starts), expected, atol=1e-5, rtol=1e-5)
    beside = torch.stack([starts, starts * 0 + 5], dim=1)[:, 0]
    torch.testing.assert_close(projection(x, beside), expected, atol=1e-5, rtol=1e-5)
    assert projection(x[:0], torch.zeros(6, dtype=torch.int64)).shape == (0, 48)


def test_rows_that_do_not_fit(monkeypatch):
    projection, x, starts, _ = mixed_projection()
    for width in (32, 63, 100, 128):
        with pytest.raises(ValueError, match=f"got rows of width {width}, expected 64"):
            projection(torch.randn(12, width), starts)
        with pytest.raises(ValueError, match=f"got rows of width {width}, expected 64"):
            projection.linear(0, torch.randn(2, width))
    for wrong in (starts[:-1], starts.int(), torch.cat([starts, starts])):
        with pytest.raises(ValueError, match=r"starts is .* expected \(6,\) of torch.int64"):
            projection(x, wrong)
    with pytest.raises(ValueError, match="starts goes from 0 to 9, but there are 8 rows"):
        projection(x[:8], starts)
    with pytest.raises(ValueError, match="expected no value below the one before it"):
        projection(x, torch.tensor([0, 100, 3, 5, 6, 9]))


@pytest.mark.parametrize("only", [(), (Native,)])
@pytest.mark.parametrize("gradients", [False, True])
def test_modes_and_defaults_of_the_process(only, gradients, monkeypatch):
    """The kernel is chosen, compiled and checked under whatever the caller has set."""
    use(monkeypatch, *only)
    projection, x, starts, expected = mixed_projection()
    native.library.cache_clear()
    x.requires_grad_(gradients)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            product = projection(x, starts)
            assert native.library() is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert (product.float() - expected).norm() < 0.02 * expected.norm()
    if gradients:
        product.sum().backward()
        assert x.grad[:9].abs().min() > 0


def test_gradients_through_a_projection():
    projection, x, starts, _ = mixed_projection()
    projection(x.requires_grad_(), starts).sum().backward()
    for expert, (first, last) in enumerate(itertools.pairwise(starts.tolist())):
        torch.testing.assert_close(x.grad[first:last], projection.weight(expert).sum(0).expand(last - first, -1))
    assert x.grad[9:].abs().max() == 0


def test_dequantizing_a_bucket_for_one_launch(monkeypatch):
    """What runs on a device without a kernel."""
    projection, x, starts, expected = mixed_projection()
    asked = []

    def dequantized(module, x, starts, experts, y):
        weights = module.weights
        module.weights = lambda indices, dtype: asked.append(len(indices)) or weights(indices, dtype)
        packed_module.multiply_rows(module, x, starts, experts, y, together=True)

    for kind in (PackedMatrices, DenseMatrices):
        monkeypatch.setattr(kind, "grouped", dequantized)
        monkeypatch.setattr(kind, "kernel_for", lambda self, x: None)
    torch.testing.assert_close(projection(x, starts), expected)
    assert asked == [1, 1, 1, 1]  # expert 1 has no row
    assert projection(x[:0], torch.zeros(6, dtype=torch.int64)).shape == (0, 48)
