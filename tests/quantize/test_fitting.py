"""The quantizer: exact on what it can represent, unbiased, and judged by the loss of a trained model."""

import pytest
import torch
from torch import Tensor

from moe_precision.quantize.codec import fitting
from moe_precision.quantize.codec.fitting import (
    FitError,
    at_a_time,
    least_squares_codes,
    least_squares_scale,
    quantize_matrices,
    quantize_matrix,
    unbiased_scale,
)
from moe_precision.quantize.codec.packing import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 64), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 8 * bits)  # 3-bit codes cost exactly 3 bits
    assert torch.equal(unpack(packed, bits), codes)


def test_packing_is_little_endian():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    number = sum(code << (3 * k) for k, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, 3).tolist()) == number.to_bytes(3, "little")
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [0b10000001]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_weight_on_the_grid_is_kept(bits):
    codes = torch.randint(0, 2**bits, (16, 64))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1  # the whole range is used
    weight = 0.5 * codes.float() - 3
    found, scale, offset = quantize_matrix(weight, bits, 64)
    torch.testing.assert_close(scale.float() * found + offset.float(), weight)


def test_one_bit_by_hand():
    groups = torch.tensor([[0.0, 1.0, 4.0, 5.0]])
    codes = least_squares_codes(groups, 1)
    assert codes.tolist() == [[0, 0, 1, 1]]
    scale, offset = least_squares_scale(groups, codes)
    assert (scale.item(), offset.item()) == (4.0, 0.5)  # means of the two halves: 0.5 and 4.5
    scale, offset = unbiased_scale(groups, codes)
    # variance of the weights 4.25, covariance with the codes 1: scale 4.25, around the mean 2.5
    assert (scale.item(), offset.item()) == (4.25, 0.375)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gain_is_unbiased_and_plain_least_squares_shrinks(bits):
    groups = torch.randn(500, 64)
    codes = least_squares_codes(groups, bits)

    def gain(scale, offset):
        fitted = scale * codes + offset
        centred, fitted = groups - groups.mean(1, keepdim=True), fitted - fitted.mean(1, keepdim=True)
        return ((centred * fitted).sum(1) / centred.square().sum(1)).mean().item()

    assert gain(*unbiased_scale(groups, codes)) == pytest.approx(1, abs=1e-5)
    assert gain(*least_squares_scale(groups, codes)) < 0.995
    # the formula of the least-squares fit q: q' = mu + (q - mu) * sum((w-mu)^2) / sum((q-mu)(w-mu))
    scale, offset = least_squares_scale(groups, codes)
    q = scale * codes + offset
    mu = q.mean(1, keepdim=True)
    factor = (groups - mu).square().sum(1, keepdim=True) / ((q - mu) * (groups - mu)).sum(1, keepdim=True)
    scale, offset = unbiased_scale(groups, codes)
    torch.testing.assert_close(scale * codes + offset, mu + (q - mu) * factor, atol=1e-4, rtol=1e-4)


def round_to_nearest(groups: Tensor, bits: int) -> Tensor:
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (groups - low).div(scale).round() * scale + low


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.588), (2, 0.326), (3, 0.171), (4, 0.085)])
def test_weight_error_on_gaussian_weights(bits, limit):
    # the limits: alternating least squares as measured on Gaussian weights in groups of 64, and 0.1 percent
    groups = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    codes = least_squares_codes(groups, bits)
    scale, offset = least_squares_scale(groups, codes)
    error = (scale * codes + offset - groups).norm()
    assert error / groups.norm() < limit
    assert error < (round_to_nearest(groups, bits) - groups).norm()


def test_constant_and_zero_groups_are_exact():
    weight = torch.cat([torch.full((2, 32), 0.25), torch.zeros(2, 32)], dim=1)
    codes, scale, offset = quantize_matrix(weight, 2, 32)
    assert (scale == 0).all()
    assert offset.tolist() == [[0.25, 0.0], [0.25, 0.0]]
    assert codes.max() <= 3


def test_values_that_float16_scales_cannot_hold():
    for weight, shown in (
        (torch.full((2, 32), 1e6), r"1e\+06"),
        (torch.randn(2, 32) * 1e-7, "e-07"),
        (torch.full((2, 32), float("nan")), "nan"),
    ):
        with pytest.raises(ValueError, match=rf"float16 scales cannot hold.*{shown}; leave it at 16 bits"):
            quantize_matrix(weight, 8, 32)


@pytest.mark.parametrize("deviation", [1e-3, 1e-2, 1.0, 100.0])
def test_eight_bits_are_exact_over_the_range_of_real_weights(deviation):
    weight = torch.randn(64, 64) * deviation + deviation
    codes, scale, offset = quantize_matrix(weight, 8, 64)
    assert (codes * scale.float() + offset.float() - weight).norm() / weight.norm() < 0.006


def test_chunks_do_not_change_the_result(monkeypatch):
    weight = torch.randn(40, 64)
    whole = quantize_matrix(weight, 3, 32)
    monkeypatch.setattr(fitting, "CHUNK", 64 * 7)
    for one, other in zip(whole, quantize_matrix(weight, 3, 32), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_several_matrices_are_what_each_is_alone(bits, dtype, monkeypatch):
    """One is done after two rounds, another is constant in part: neither changes the others."""
    weights = (torch.randn(5, 24, 96) * torch.rand(5, 1, 96)).to(dtype)
    weights[1] = weights[1].sign()
    weights[2, :, :32] = 0.25
    for columns in (None, torch.rand(5, 96)):
        for chunk in (1 << 18, 96 * 7):  # the second ends within matrices
            monkeypatch.setattr(fitting, "CHUNK", chunk)
            together = quantize_matrices(weights, bits, 32, columns)
            for index, one in enumerate(zip(*together, strict=True)):
                alone = quantize_matrix(weights[index], bits, 32, None if columns is None else columns[index])
                assert all(map(torch.equal, one, alone))


def test_of_several_matrices_the_one_that_cannot_be_fitted_is_named():
    weights = torch.randn(4, 8, 32)
    weights[2, 3, 4] = float("inf")
    with pytest.raises(FitError, match="magnitudes up to inf; leave it") as raised:
        quantize_matrices(weights, 2, 32)
    assert raised.value.index == 2


def test_small_matrices_are_fitted_together_and_large_ones_alone():
    assert [list(part) for part in at_a_time([7, 3, 5], (64, 128))] == [[7, 3, 5]]
    assert [len(part) for part in at_a_time(range(70), (64, 128))] == [32, 32, 6]
    assert [list(part) for part in at_a_time(range(3), (4096, 4096))] == [[0], [1], [2]]
    assert list(at_a_time([], (64, 128))) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "bits", [pytest.param(1, marks=pytest.mark.thorough), 2, pytest.param(3, marks=pytest.mark.thorough)]
)
def test_order_of_the_quantizers_by_loss(trained, bits):
    """Plain least squares has the least weight error; the unbiased fit has the least loss."""
    model, blocks = trained
    banks = [p for name, p in model.named_parameters() if ".experts." in name]
    originals = [bank.detach().clone() for bank in banks]

    def increase(quantized) -> float:
        with torch.no_grad():
            before = model(input_ids=blocks, labels=blocks).loss
            for bank, original in zip(banks, originals, strict=True):
                bank.copy_(quantized(original.reshape(-1, 64)).view_as(original))
            after = model(input_ids=blocks, labels=blocks).loss
            for bank, original in zip(banks, originals, strict=True):
                bank.copy_(original)
        return (after - before).item()

    def fitted(groups, scale_of):
        codes = least_squares_codes(groups, bits)
        scale, offset = scale_of(groups, codes)
        return scale * codes + offset

    groups = torch.cat([original.reshape(-1, 64) for original in originals])
    error = [
        (fit - groups).norm()
        for fit in (fitted(groups, least_squares_scale), fitted(groups, unbiased_scale), round_to_nearest(groups, bits))
    ]
    assert error == sorted(error)
    rtn = increase(lambda groups: round_to_nearest(groups, bits))
    least_squares = increase(lambda groups: fitted(groups, least_squares_scale))
    unbiased = increase(lambda groups: fitted(groups, unbiased_scale))
    assert unbiased < rtn
    assert unbiased < least_squares
