"""Packed models: the right weights, bit-identical after a reload, and no path on which experts go wrong in silence."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from moe_precision import (
    PlanError,
    PlanQuantizationConfig,
    QuantizationError,
    UnsupportedLayoutError,
    allocate,
    quantize_model,
)
from moe_precision.checkpoints import Checkpoint, CheckpointError, load_model
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.modules import PackedLinear, PackedProjection
from moe_precision.quantize.writer import quantize_checkpoint
from tests.support.models import DECODER, PlainMoE, auto_class, build, logits

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
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


def test_generate(mixtral):
    quantize_model(mixtral, allocate(mixtral, group_size=64))
    out = mixtral.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 3


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
    assert 8 * codes / weights == plan.average_bits  # dense: 3 bits cost 3
    sentinels = 32 * (4 if family == "mixtral" else 2 * 8 * 2) / weights
    assert written.stored_bits_per_expert_weight(plan) == pytest.approx(plan.stored_bits + sentinels)
    assert packed.get_memory_footprint() < model.get_memory_footprint() / 2


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


def drop(file, name):
    """Takes one tensor out of a safetensors file and leaves its metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata=metadata)


# -- nothing may go wrong in silence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_import_loading_fails(family, tmp_path):
    model = build(family)
    quantize_model(model, mixed_plan(model)).save_pretrained(tmp_path)
    code = (
        f"from transformers import {auto_class(family).__name__} as A\n"
        f"import sys; assert 'moe_precision' not in sys.modules\n"
        f"A.from_pretrained({str(tmp_path)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "RuntimeError" in result.stderr
    assert "size mismatch" in result.stderr + result.stdout


@pytest.mark.parametrize("suffix", ["codes", "scale", "offset", "matrices", "gate.weight"])
def test_a_packed_tensor_that_is_not_there(suffix, tmp_path):
    model = build("mixtral")
    quantize_model(model, mixed_plan(model)).save_pretrained(tmp_path)
    victim = next(name for name in load_file(tmp_path / "model.safetensors") if name.endswith(suffix))
    drop(tmp_path / "model.safetensors", victim)
    with pytest.raises(QuantizationError, match=f"not in the checkpoint, the first is '{victim}'"):
        load_model(tmp_path)


def test_a_packed_tensor_outside_of_the_experts_that_is_not_there(tmp_path, mixtral):
    quantize_model(mixtral, allocate(mixtral, group_size=64), non_expert_bits=8).save_pretrained(tmp_path)
    drop(tmp_path / "model.safetensors", "model.layers.1.self_attn.k_proj.packed.codes")
    with pytest.raises(QuantizationError, match=r"first is 'model\.layers\.1\.self_attn\.k_proj\.packed\.codes'"):
        load_model(tmp_path)


def test_a_float_checkpoint_that_lacks_attention(tmp_path, mixtral):
    mixtral.save_pretrained(tmp_path / "float")
    drop(tmp_path / "float" / "model.safetensors", "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match=r"lacks \['model\.layers\.1\.self_attn\.q_proj\.weight'\]"):
        quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=64), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_leave_the_model_whole(mixtral):
    plan = allocate(mixtral, group_size=64)
    name = "model.layers.1.mlp.experts.down_proj"
    with torch.no_grad():
        mixtral.get_parameter(name)[3, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=f"'{name}' holds values that are not finite"):
        quantize_model(mixtral, plan)
    assert isinstance(mixtral.get_submodule("model.layers.0.mlp.experts").gate_up_proj, nn.Parameter)


def test_a_packed_model_is_not_packed_again(mixtral):
    plan = allocate(mixtral, group_size=64)
    quantize_model(mixtral, plan)
    with pytest.raises(ValueError, match="are quantized already"):
        quantize_model(mixtral, plan)


def test_misspelt_options_are_errors(mixtral):
    with pytest.raises(TypeError, match="non_expert_bit"):
        PlanQuantizationConfig(allocate(mixtral, group_size=64), non_expert_bit=8)


@pytest.mark.parametrize("victim", ["experts.7.w2.weight", "experts", "gate.weight"])
def test_a_float_checkpoint_that_lacks_weights(victim, tmp_path, mixtral):
    mixtral.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not ("layers.1." in name and victim in name)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((QuantizationError, RuntimeError, ValueError)):
        load_model(tmp_path, quantization_config=PlanQuantizationConfig(allocate(mixtral, group_size=64)))


def test_a_plan_for_another_model(tmp_path, mixtral):
    mixtral.save_pretrained(tmp_path / "float")
    plan = allocate(build("mixtral", num_local_experts=4), group_size=64)
    with pytest.raises(PlanError, match="the plan is for another model"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "packed")
    with pytest.raises(PlanError, match="the plan is for another model"):
        quantize_model(mixtral, plan)
    assert not (tmp_path / "packed").exists()


def test_a_dense_model(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODER))
    with pytest.raises(ValueError, match="no Mixture-of-Experts layer"):
        quantize_model(dense, allocate(build("mixtral"), group_size=64))


def test_fused_experts_outside_of_the_interface():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**DECODER, "num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **sizes))
    with pytest.raises(UnsupportedLayoutError, match=r"layer 'model.layers.0.*fused, but not through"):
        quantize_model(model, allocate(model, group_size=32))


def test_damaged_checkpoints(tmp_path, mixtral):
    plan = allocate(mixtral, group_size=64)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        quantize_checkpoint(tmp_path / "missing", plan, tmp_path / "out")
    mixtral.save_pretrained(tmp_path / "float", max_shard_size="200KB")
    shards = sorted((tmp_path / "float").glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=f"{shards[1].name}' is truncated or damaged"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks the weight file '{shards[1].name}'"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")
    shards[1].write_bytes(content)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", plan, tmp_path / "twice")
    (tmp_path / "float" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")


def test_folders_that_are_not_replaced(tmp_path, mixtral):
    plan = allocate(mixtral, group_size=64)
    mixtral.save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="is, or lies in, the float checkpoint"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "float" / ".." / "float")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="no checkpoint folder"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "keep me"


def test_an_interrupted_quantization_leaves_the_old_folder(tmp_path, mixtral, monkeypatch):
    mixtral.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=64), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr("shutil.copy2", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=32), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1  # to go on from
    monkeypatch.undo()
    quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=32), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert sorted(os.listdir(tmp_path)) == ["float", "out"]


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
    for expert, weight in enumerate(weights):
        projection.put(expert, weight)
    assert torch.equal(projection.weight(3), weights[3])
    for expert, weight in enumerate(weights):
        assert (projection.weight(expert) - weight).norm() / weight.norm() < 0.5
    x = torch.randn(2, 32)
    torch.testing.assert_close(projection.linear(2, x), x @ projection.weight(2).T)
