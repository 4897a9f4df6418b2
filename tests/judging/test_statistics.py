"""Intervals, correlations and p-values against values worked out by hand or by brute force."""

import math

import pytest
import torch

from moe_precision.judging.statistics import (
    bootstrap,
    mean_of_runs,
    p_among_draws,
    rank_correlation,
    ratio_of_runs,
    resample_documents,
)


def test_resamples_draw_as_many_documents_as_there_are():
    draws = resample_documents(7, resamples=100)
    assert draws.shape == (100, 7)
    assert (draws.sum(1) == 7).all()
    assert torch.equal(draws, resample_documents(7, resamples=100))
    assert draws.mean().item() == pytest.approx(1.0)


def test_a_bootstrap_interval_has_the_standard_errors_width():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.full((400,), 3.0)
    found = bootstrap(values * 3, counts, resample_documents(400))
    assert found.value == pytest.approx(values.mean().item())
    width = 2 * 1.96 * values.std().item() / 20
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_documents_weigh_by_their_tokens():
    found = bootstrap(torch.tensor([2.0, 30.0]), torch.tensor([1, 10]), resample_documents(2))
    assert found.value == pytest.approx(32 / 11)
    assert (found.low, found.high) == (2.0, 3.0)


def test_the_mean_of_runs_by_students_t():
    found = mean_of_runs([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - found.value == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # t of 2 degrees, 97.5 %
    assert mean_of_runs([1.0]).low == 1.0


@pytest.mark.slow
def test_a_ratio_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        common = torch.randn(6, generator=generator) * 0.3
        a = 2.0 + common + torch.randn(6, generator=generator) * 0.1
        b = 4.0 + common + torch.randn(6, generator=generator) * 0.1
        interval = ratio_of_runs(a.tolist(), b.tolist())
        covered += interval.low <= 0.5 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98
    unknown = ratio_of_runs([1.0, 2.0], [1.0, -1.0])
    assert (unknown.low, unknown.high) == (-math.inf, math.inf)


def test_rank_correlation_by_spearmans_formula():
    a, b = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([20.0, 10, 30, 50, 40])
    differences = torch.tensor([1.0, -1, 0, 1, -1])
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * differences.square().sum().item() / (5 * 24))
    assert math.isnan(rank_correlation(torch.ones(4), torch.arange(4.0)))


def test_the_p_value_of_a_loss_among_draws():
    assert p_among_draws(0.5, [1.0] * 39) == pytest.approx(0.05)
    assert p_among_draws(1.5, [1.0] * 39) == pytest.approx(0.05)
    assert p_among_draws(1.0, [0.5, 2.0, 3.0]) == pytest.approx(1.0)  # one of three below: 2 (1 + 1) / 4
    generator = torch.Generator().manual_seed(0)
    found = [p_among_draws(float(row[0]), row[1:].tolist()) for row in torch.rand(2000, 40, generator=generator)]
    assert sum(p <= 0.05 for p in found) / 2000 == pytest.approx(0.05, abs=0.015)


def test_too_few_documents_give_no_interval():
    draws = resample_documents(3)
    one = bootstrap(torch.tensor([1.0, 0, 0]), torch.tensor([2.0, 0, 0]), draws)
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert str(one) == "0.5000"
    two = bootstrap(
        torch.tensor([1.0, 3, 0]), torch.tensor([2.0, 2, 0]), draws
    )  # resamples without a token are left out
    assert (two.low, two.high) == (0.5, 1.5)
