"""Runs with precision="bf16-true", in which Lightning makes bfloat16 the default dtype of new tensors."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader

from moe_precision import allocate, collect_statistics, quantize_model
from moe_precision.quantize.writer import distill_streamed
from moe_precision.recording.signals import expert_load
from tests.quantize.test_distilling import text
from tests.support.models import build
from tests.support.trainers import Language, monitor, trainer


@contextmanager
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_run_in_bfloat16_counts_every_token(tmp_path):
    """3 batches of 4 rows of 8 tokens, each sent to two experts."""
    callback = monitor(method="load", statistics_batches=0)
    rows = DataLoader(torch.randint(128, (12, 8)), batch_size=4)
    trainer(tmp_path, callback, precision="bf16-true").fit(Language(), rows)
    for layer in callback.plan.layers.values():
        assert sum(layer.signals["expert_load"]) == 192


def test_counts_are_in_float32():
    with half_by_default():  # bfloat16 has no number between 256 and 258
        tokens, weights = expert_load(torch.ones(300, dtype=torch.int64), torch.full((300,), 1.5), 2)
    assert tokens.tolist() == [0.0, 300.0]
    assert weights.tolist() == [0.0, 450.0]


@pytest.mark.slow
def test_statistics_and_scales_are_those_of_float32(tmp_path):
    model, batches = build("mixtral"), text(6)
    model.save_pretrained(tmp_path)
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)

    def results():
        statistics = collect_statistics(model, batches)
        grid, _ = distill_streamed(tmp_path, plan, batches, steps=2)
        packed = quantize_model(copy.deepcopy(model), plan, statistics=statistics)
        kinds = grid.scales, grid.offsets, grid.codes, statistics.diagonals, statistics.correlations
        found = [tensor for kind in kinds for of_layer in kind.values() for tensor in of_layer.values()]
        return [*found, *packed.state_dict().values()]

    expected = results()
    with half_by_default():
        found = results()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
