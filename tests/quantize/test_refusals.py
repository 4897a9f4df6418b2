"""Checkpoints, plans and models that are incomplete, damaged or do not fit are errors, and never wrong experts."""

import os

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
from moe_precision.checkpoints import CheckpointError, load_model
from moe_precision.quantize.writer import quantize_checkpoint
from tests.quantize.test_quantize import FAMILIES, mixed_plan
from tests.support.models import DECODER, auto_class, build, fresh_python


def drop(file, name):
    """Takes one tensor out of a safetensors file and leaves its metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata=metadata)


WITHOUT_IMPORT = """
import sys
sys.stderr = sys.stdout  # where transformers says why
import transformers
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, name).from_pretrained(folder)
    except RuntimeError:
        print("the end of", folder)
assert "moe_precision" not in sys.modules
"""


@pytest.mark.slow
def test_without_the_import_loading_fails(tmp_path):
    arguments = []
    for family in FAMILIES:
        model = build(family)
        quantize_model(model, mixed_plan(model)).save_pretrained(tmp_path / family)
        arguments += [auto_class(family).__name__, str(tmp_path / family)]
    printed = fresh_python(WITHOUT_IMPORT, *arguments)
    for folder in arguments[1::2]:
        assert f"the end of {folder}\n" in printed
        reason, _, printed = printed.partition(f"the end of {folder}\n")
        assert "size mismatch" in reason


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["codes", "scale", "offset", "matrices", "gate.weight"])
def test_a_packed_tensor_that_is_not_there(suffix, tmp_path):
    model = build("mixtral")
    quantize_model(model, mixed_plan(model)).save_pretrained(tmp_path)
    victim = next(name for name in load_file(tmp_path / "model.safetensors") if name.endswith(suffix))
    drop(tmp_path / "model.safetensors", victim)
    with pytest.raises(QuantizationError, match=f"not in the checkpoint, the first is '{victim}'"):
        load_model(tmp_path)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(FileExistsError, match="not a checkpoint folder"):
        quantize_checkpoint(tmp_path / "float", plan, tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "keep me"


@pytest.mark.slow
def test_an_interrupted_quantization_leaves_the_old_folder(tmp_path, mixtral, monkeypatch):
    mixtral.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=64), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr("shutil.copy2", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=32), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1  # to resume from
    monkeypatch.undo()
    quantize_checkpoint(tmp_path / "float", allocate(mixtral, group_size=32), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert sorted(os.listdir(tmp_path)) == ["float", "out"]
