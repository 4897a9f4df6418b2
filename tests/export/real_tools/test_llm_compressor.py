"""llm-compressor carries a plan out, expert by expert and projection by projection, down to 2 bits."""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from transformers import AutoModelForCausalLM

from moe_precision.checkpoints import Checkpoint
from moe_precision.export import export, plan_of_checkpoint
from tests.export.real_tools.conftest import check_experts, float_experts, mixed


@pytest.mark.parametrize("engine", [None, "vllm"])
def test_packed_shapes_prove_the_bits(checkpoint, uniform_layers, tmp_path, engine):
    layers = float_experts(checkpoint)
    plan = mixed(checkpoint, (1, 2, 3, 4, 5, 6, 7, 8, 16)) if engine is None else uniform_layers
    found = export(plan, "llm-compressor", engine)
    (tmp_path / "recipe.yaml").write_text(found.text)
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    oneshot(model=model, recipe=str(tmp_path / "recipe.yaml"))
    check_experts(model, layers, found.plan)  # llm-compressor's own forward pass, through its codes
    model.save_pretrained(tmp_path / "quantized", save_compressed=True)
    read = plan_of_checkpoint(tmp_path / "quantized")
    assert read.diff(found.plan) == []
    assert read.notes["group_sizes"] == [64]
    packed = [name for name in Checkpoint(tmp_path / "quantized").tensors if name.endswith("weight_packed")]
    assert packed
    assert all("experts" in name for name in packed)
