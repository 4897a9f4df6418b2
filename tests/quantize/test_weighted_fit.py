"""The fit whose errors are weighted by column, against weighted least squares."""

import pytest
import torch

from moe_precision.quantize.codec.fitting import least_squares_scale, quantize_matrix, unbiased_scale


def test_a_weighted_fit_against_weighted_least_squares():
    generator = torch.Generator().manual_seed(0)
    groups, weights = torch.randn(5, 16, generator=generator), torch.rand(5, 16, generator=generator) + 0.1
    weights = weights / weights.mean(1, keepdim=True)
    codes = (groups + 0.3 * torch.randn(5, 16, generator=generator)).add(1.5).round().clamp(0, 3)
    scale, offset = least_squares_scale(groups, codes, weights)
    for row in range(5):
        root = weights[row].sqrt().unsqueeze(1)
        design = torch.stack([codes[row], torch.ones(16)], dim=1)
        solution = torch.linalg.lstsq(design * root, groups[row].unsqueeze(1) * root).solution.squeeze()
        torch.testing.assert_close(torch.stack([scale[row, 0], offset[row, 0]]), solution, rtol=1e-4, atol=1e-5)
    fitted = scale * codes + offset
    mean = (weights * groups).mean(1, keepdim=True)
    gain = (weights * (groups - mean).square()).sum(1) / (weights * (fitted - mean) * (groups - mean)).sum(1)
    unbiased, shift = unbiased_scale(groups, codes, weights)  # the formula of docs and docstring
    torch.testing.assert_close(
        unbiased * codes + shift, mean + (fitted - mean) * gain.unsqueeze(1), rtol=1e-4, atol=1e-5
    )


def test_columns_that_count_more_are_fitted_better():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    heavy = torch.ones(128)
    heavy[::4] = 50.0

    def errors(column_weights):
        codes, scale, offset = quantize_matrix(weight, 2, 64, column_weights)
        scaled = codes.view(64, 2, 64) * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
        return (scaled.view(64, 128) - weight).square().mean(0)

    plain, weighted = errors(None), errors(heavy)
    assert weighted[::4].mean() < 0.9 * plain[::4].mean()
    torch.testing.assert_close(errors(torch.full((128,), 7.0)), plain)
    with pytest.raises(ValueError, match="expected 128 finite column weights"):
        quantize_matrix(weight, 2, 64, torch.ones(64))
