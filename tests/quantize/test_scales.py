"""Eight-bit scales: what can be stored, and that storing it again changes nothing."""

import pytest
import torch

from moe_precision.plans.widths import SCALE_AND_OFFSET_BITS
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.codec.scales import BITS_PER_GROUP, BLOCK, blocks_of, compress, expand, stored_scales
from moe_precision.quantize.kernels import scaled


def test_values_by_hand():
    values = torch.arange(1024, 2048, 4).view(8, 32) / 1024  # each row a block, whose ends float16 holds
    steps, ends = compress(values)
    assert torch.equal(ends.float(), values[:, [0, -1]])
    assert steps[3].tolist() == [round(255 * i / 31) for i in range(32)]
    torch.testing.assert_close(expand(steps, ends).float(), values, atol=1e-3, rtol=0)
    assert compress(torch.full((2, 5), 3.0))[0].tolist() == [[0] * 5] * 2  # one value: step 0


def test_a_group_costs_18_bits():
    assert BITS_PER_GROUP == SCALE_AND_OFFSET_BITS == 8 + 8 + 4 * 16 / BLOCK
    assert blocks_of(64, 32) == 64
    assert blocks_of(3, 5) == 1
    steps, ends = compress(torch.rand(2, 11, 7))  # 77 groups per matrix
    assert steps.shape == (2, 11, 7)
    assert ends.shape == (2, 3, 2)
    assert blocks_of(11, 7) == 3


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.3, 3.0])
def test_storing_again_changes_nothing(spread):
    """This holds even where a step of the block is as small as float16's own."""
    generator = torch.Generator().manual_seed(0)
    for center in (0.0, 0.01, 1.0):
        values = center + spread * torch.randn(400, 160, generator=generator)
        for rounded in (torch.round, torch.floor, torch.ceil):
            stored = expand(*compress(values, rounded))
            assert torch.equal(expand(*compress(stored)), stored)
            assert torch.equal(compress(expand(*compress(stored)))[0], compress(stored)[0])


@pytest.mark.parametrize("bits", [5, 8])
def test_wide_codes_keep_their_range(bits):
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(64, 32, generator=generator) + 0.1
    offset = -(2 ** (bits - 1)) * scale + torch.randn(64, 32, generator=generator) * 0.1
    stored, lower = stored_scales(scale, offset, bits)
    top = 2**bits - 1
    assert (lower.float() <= offset + 0.25 * scale).all()  # float16 rounds the ends
    assert (lower.float() + top * stored.float() >= offset + top * scale - 0.25 * scale).all()
    assert (stored.float() / scale).mean() < 1.1


@pytest.mark.parametrize(("times", "bits", "worst"), [(10, 2, 0.35), (10, 4, 0.095), (10, 8, 0.006), (100, 2, 0.45)])
def test_a_loud_group_leaves_its_neighbours_their_precision(times, bits, worst):
    """A group ten or a hundred times as large as the others of its block; 0.344, 0.084, 0.0055 where all are alike."""
    torch.manual_seed(0)
    weight = torch.randn(8, 32 * 64)
    weight[:, :64] *= times
    quantized = scaled(*quantize_matrix(weight, bits, 64))
    assert (quantized - weight)[:, 64:].norm() / weight[:, 64:].norm() < worst
