"""Packed models: the right weights, and bit-identical after a reload."""

import copy

import pytest
import torch
from torch import nn

from moe_precision import (
    PlanError,
    PlanQuantizationConfig,
    allocate,
    quantize_model,
)
from moe_precision.checkpoints import Checkpoint, load_model
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.modules import PackedLinear, PackedProjection
from moe_precision.quantize.writer import quantize_checkpoint
from tests.support.models import PlainMoE, auto_class, build, logits

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "switch_transformers", "nllb-moe"]
MIXED = [1, 2, 3, 4, 8, 16, 2, 3]


def mixed_plan(model, group_size=32):
    """All supported widths in every layer, and other widths for the last projection."""
    plan = allocate(model, group_size=group_size)
    for layer in plan.layers.values():
        first, last = layer.projection_bits
        layer.projection_bits[first][:] = MIXED
        layer.projection_bits[last][:] = MIXED[::-1]
    return plan


def expert_matrix(model, layer, expert, projection):
    """The float matrix that a packed model computes with."""
    container = model.get_submodule(layer.experts)
    if layer.fused:
        return container.packed[projection].weight(expert)
    module = container[f"expert_{expert}"].get_submodule(projection)
    return module.packed.weight(0) if isinstance(module, PackedLinear) else module.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in FAMILIES),
        (FAMILIES[0], torch.bfloat16),
        *(pytest.param(family, torch.bfloat16, marks=pytest.mark.thorough) for family in FAMILIES[1:]),
    ],
)
def test_save_and_reload_are_bit_identical(family, dtype, tmp_path):
    build(family).to(dtype).save_pretrained(tmp_path / "float")
    auto = auto_class(family)
    model = auto.from_pretrained(tmp_path / "float", dtype=dtype)
    plan = mixed_plan(model)
    loaded = auto.from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=PlanQuantizationConfig(plan))
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "packed")
    again, info = auto.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "again")), expected)

    # the live model gives the same, and so does what it saves
    live = quantize_model(model, plan)
    assert torch.equal(logits(live), expected)
    live.save_pretrained(tmp_path / "live")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "live")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_holds_its_own_weights(family):
    model = build(family)
    plan = mixed_plan(model)
    original = copy.deepcopy(model)
    quantize_model(model, plan)
    for layer in find_moe_layers(original):
        bits_of = plan.layers[layer.name].projection_bits
        for expert in range(layer.num_experts):
            for projection, weight in layer.expert_weights(expert).items():
                packed = expert_matrix(model, layer, expert, projection)
                bits = bits_of[projection][expert]
                if bits == 16:
                    assert torch.equal(packed, weight)
                    continue
                codes, scale, offset = quantize_matrix(weight, bits, 32)
                groups = codes.view(*scale.shape, 32) * scale.float()[..., None] + offset.float()[..., None]
                torch.testing.assert_close(packed, groups.view_as(weight))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_stay_close_to_float(family):
    model = build(family)
    expected = logits(model)
    quantize_model(model, allocate(model, method="uniform", average_bits=8, group_size=32))
    assert (logits(model) - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_left_alone_at_16_bits_changes_nothing(family):
    model = build(family)
    expected = logits(model)
    quantize_model(model, allocate(model, method="uniform", average_bits=16, group_size=32))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_only_experts_change(mixtral):
    before = {name: p.clone() for name, p in mixtral.state_dict().items() if ".experts." not in name}
    quantize_model(mixtral, allocate(mixtral, group_size=64))
    after = mixtral.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "model.layers.0.mlp.gate.weight" in before


@pytest.mark.slow
def test_generate(mixtral):
    quantize_model(mixtral, allocate(mixtral, group_size=64))
    out = mixtral.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_file_bytes_are_what_the_plan_says(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, average_bits=2.5, bits=(1, 2, 3), group_size=64)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "packed")
    packed = load_model(tmp_path / "packed")
    assert Checkpoint(tmp_path / "float").stored_bits_per_expert_weight(plan) == 32
    written = Checkpoint(tmp_path / "packed")
    codes = sum(tensor.nbytes for name, tensor in written.tensors.items() if name.endswith(".codes"))
    weights = sum(layer.shape.expert_size * 8 for layer in plan.layers.values())
    assert 8 * codes / weights == plan.average_bits  # dense: 3-bit codes cost exactly 3 bits
    sentinels = 32 * (4 if family == "mixtral" else 2 * 8 * 2) / weights
    assert written.stored_bits_per_expert_weight(plan) == pytest.approx(plan.stored_bits + sentinels)
    assert packed.get_memory_footprint() < model.get_memory_footprint() / 2


@pytest.mark.slow
def test_non_expert_bits(tmp_path, mixtral):
    mixtral.save_pretrained(tmp_path / "float")
    plan = allocate(mixtral, group_size=32)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "packed", non_expert_bits=8)
    model = quantize_model(mixtral, plan, non_expert_bits=8)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    assert isinstance(model.lm_head, nn.Linear)
    assert torch.equal(logits(load_model(tmp_path / "packed")), logits(model))
    with pytest.raises(PlanError, match="non_expert_bits must be 4, 8 or None, got 3"):
        PlanQuantizationConfig(plan, non_expert_bits=3)


@pytest.mark.slow
def test_switch_router_is_kept_when_other_linears_are_packed():
    model = build("switch_transformers")
    quantize_model(model, allocate(model, group_size=32), non_expert_bits=8)
    router = model.get_submodule("encoder.block.1.layer.1.mlp.router.classifier")
    assert isinstance(router, nn.Linear)
    assert isinstance(model.get_submodule("encoder.block.0.layer.0.SelfAttention.q"), PackedLinear)


def test_a_users_own_model():
    model = nn.Sequential(PlainMoE(), PlainMoE())
    x = torch.randn(50, 32)
    expected = model(x)
    plan = allocate(model, method="uniform", average_bits=8, group_size=32)
    quantize_model(model, plan)
    assert isinstance(model[0].experts[0][0], PackedLinear)
    assert (model(x) - expected).norm() / expected.norm() < 1e-2


# -- casts and buckets ------------------------------------------------------------------------------------------------


def test_casting_the_model_keeps_scales_exact(mixtral):
    quantize_model(mixtral, allocate(mixtral, group_size=64))
    projection = mixtral.get_submodule("model.layers.0.mlp.experts").packed["down_proj"]
    before = projection.weight(3)
    nn.Module.to(mixtral, torch.bfloat16)
    assert torch.equal(projection.weight(3), before)
    assert projection.bits_2.ends.dtype == torch.float16


def test_projection_places_experts_by_width():
    projection = PackedProjection([3, 2, 3, 16], (16, 32), 32, torch.float32)
    assert {name: m.codes.shape[0] for name, m in projection.named_children() if name != "bits_16"} == {
        "bits_2": 1,
        "bits_3": 2,
    }
    weights = torch.randn(4, 16, 32)
    projection.fill(weights)
    assert torch.equal(projection.weight(3), weights[3])
    for expert, weight in enumerate(weights):
        assert (projection.weight(expert) - weight).norm() / weight.norm() < 0.5
    x = torch.randn(2, 32)
    torch.testing.assert_close(projection.linear(2, x), x @ projection.weight(2).T)
