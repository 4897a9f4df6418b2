"""Scales distilled one layer at a time: those of the whole model in memory, in which no other layer ever is."""

import copy

import pytest

from moe_precision import allocate, distill_scales, load_model, quantize_checkpoint, quantize_model
from moe_precision.quantize.writer import distill_streamed
from tests.callbacks.test_distilling_of_a_run import assert_equal
from tests.quantize.test_distilling import text
from tests.support.models import build

FAMILIES = ["mixtral", "gpt_oss", "switch_transformers", "deepseek_v3", "qwen2_moe"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_whole_model_gives(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "float")
    batches = text(10)
    if model.config.is_encoder_decoder:
        batches = [{**batch, "labels": batch["input_ids"].flip(1)} for batch in batches]
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    expected = quantize_model(copy.deepcopy(model), plan)
    found = distill_scales(expected, model, batches, steps=12)
    grid, streamed = distill_streamed(tmp_path / "float", plan, batches, steps=12)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", grid=grid)
    assert_equal(load_model(tmp_path / "out"), expected)
    assert streamed == found
