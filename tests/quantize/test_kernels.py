"""Kernels: each multiplies right, gives the checkpoint's bits back, and is the only form of the weights in memory."""

import pytest
import torch

from moe_precision.quantize import kernels
from moe_precision.quantize.kernels import native
from moe_precision.quantize.kernels.ark import Ark
from moe_precision.quantize.kernels.int4 import Int4
from moe_precision.quantize.kernels.native import Native, NativeInt8
from tests.support.packed import bucket, use

EVERY = [
    *((Int4, bits, 64, torch.bfloat16) for bits in (1, 2, 3, 4)),
    *((Native, bits, 64, torch.bfloat16) for bits in range(1, 9)),
    *((Native, bits, 32, torch.float32) for bits in range(1, 9)),
    *((NativeInt8, bits, 64, torch.bfloat16) for bits in (1, 2, 3, 4)),
    *((NativeInt8, bits, 32, torch.float16) for bits in (1, 2, 3, 4)),
    (Native, 3, 64, torch.float16),
    *((Ark, bits, 64, torch.bfloat16) for bits in (2, 3, 4)),
    (Ark, 3, 32, torch.float16),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "bits", "group_size", "dtype"), EVERY)
def test_products_and_the_way_back(kernel, bits, group_size, dtype, monkeypatch, any_cpu):
    if kernel is Ark:
        pytest.importorskip("auto_round_kernel")
    use(monkeypatch, kernel)
    matrices = bucket(bits, group_size)
    stored = [tensor.clone() for tensor in matrices.matrices([0, 1])]
    weight = matrices.weight(1)
    for tokens in (1, 3, 9):
        x = torch.randn(tokens, 192).to(dtype)
        product, exact = matrices.linear(1, x), x.float() @ weight.T
        assert product.dtype == dtype
        assert (product.float() - exact).norm() / exact.norm() < (1e-3 if dtype == torch.float32 else 0.02)
    assert type(matrices.kernel) is kernel
    assert matrices.codes is None  # in memory once
    assert torch.equal(matrices.weight(1), weight)
    for kept, before in zip(matrices.matrices([0, 1]), stored, strict=True):
        assert torch.equal(kept, before)
    for kept, before in zip(matrices.state_dict().values(), stored, strict=True):
        assert torch.equal(kept, before)
    assert matrices.kernel is None


@pytest.mark.slow
def test_the_form_takes_little_more_memory_than_the_codes(monkeypatch, any_cpu):
    for kernel, bits in ((Int4, 4), *((Native, bits) for bits in (1, 2, 3, 4, 5, 7, 8)), (Ark, 2), (Ark, 3)):
        if kernel is Ark:
            pytest.importorskip("auto_round_kernel")
        use(monkeypatch, kernel)
        matrices = bucket(bits, 128, inp=2048, out=1024)
        packed = sum(buffer.nbytes for buffer in matrices.buffers())
        matrices.linear(0, torch.randn(1, 2048).bfloat16())
        most = 1.3 if kernel is Ark else 1.2  # its scales are float32
        assert sum(buffer.nbytes for buffer in matrices.buffers()) <= most * packed, (kernel, bits)


def test_the_order_of_choice(monkeypatch, any_cpu):
    def choice(bits, dtype=torch.bfloat16, device="cpu", training=False, out=64, exact=False):
        return kernels.choose(kernels.Request(device, dtype, training, bits, out, 256, 128, exact))

    use(monkeypatch, NativeInt8, Native, Int4)
    assert [choice(bits) for bits in range(1, 9)] == [NativeInt8] * 4 + [Native] * 4
    assert choice(4, torch.float32) is choice(4, training=True) is choice(4, exact=True) is Native
    assert choice(2, torch.float16) is NativeInt8
    assert choice(2, out=42) is None
    assert choice(2, device="cuda") is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert choice(4) is choice(2) is Int4  # twice the memory at 2 bits, but fast
    assert choice(8) is choice(2, torch.float32) is None
    pytest.importorskip("auto_round_kernel")
    use(monkeypatch, Ark, Native, Int4)
    assert [choice(bits) for bits in (1, 2, 4, 8)] == [Int4, Ark, Ark, None]
    assert choice(2, torch.float16) is Ark
    assert choice(2, exact=True) is Int4
    assert choice(2, torch.float32) is None  # it would be rounded to int8 in silence
