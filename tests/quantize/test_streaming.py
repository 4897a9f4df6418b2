"""Checkpoints are quantized in bounded memory, and bad input is refused before anything is written."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_precision import PlanError, allocate, quantize_model
from moe_precision.checkpoints import Checkpoint, CheckpointError, load_model
from moe_precision.quantize.writer import quantize_checkpoint
from moe_precision.quantize.writer.packer import Packer
from tests.quantize.test_quantize import FAMILIES, mixed_plan
from tests.support.checkpoints import contents, save_float
from tests.support.model_zoo import build_tiny
from tests.support.models import auto_class, build, logits


@pytest.fixture
def saved(tmp_path):
    return save_float(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_shards_are_what_the_live_model_is(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    plan = mixed_plan(model)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", max_shard_size="1KB")
    assert len(Checkpoint(tmp_path / "out").files) > 2
    again, info = auto_class(family).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(quantize_model(model, plan)))


@pytest.mark.slow
def test_shards_hold_whole_layers_up_to_a_size(saved):
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out, max_shard_size="1MB")
    assert [file.name for file in Checkpoint(out).files] == ["model.safetensors"]
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Checkpoint(out).nbytes
    layers: dict[str, set] = {file: set() for file in index["weight_map"].values()}
    for name, file in index["weight_map"].items():
        layers[file] |= set(name.split(".")[2:3]) if ".layers." in name else set()
    assert sorted(map(len, layers.values())) == [0, 0, 0, 1, 1, 1, 1]  # embeddings, norm and head on their own


@pytest.mark.slow
@pytest.mark.thorough
def test_workers_write_the_same_bytes(saved):
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out, max_shard_size="100KB")
    with Checkpoint(source) as checkpoint:
        quantize_checkpoint(checkpoint, plan, out.with_name("two"), max_shard_size="100KB", workers=2)
        assert not hasattr(checkpoint.config, "quantization_config")  # what was written is a copy
    assert contents(out) == contents(out.with_name("two"))
    with pytest.raises(ValueError, match="workers=0: expected at least 1"):
        quantize_checkpoint(source, plan, out, workers=0)


@pytest.mark.slow
def test_source_files_are_opened_once_and_not_once_per_shard(saved, monkeypatch):
    _, plan, source, out = saved
    opens: dict[str, Counter] = {"checkpoint": Counter(), "headers": Counter()}
    for module, counter in opens.items():

        def counting(file, *args, counter=counter, **kwargs):
            counter[Path(file).name] += 1
            return safe_open(file, *args, **kwargs)

        monkeypatch.setattr(f"moe_precision.checkpoints.{module}.safe_open", counting)
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    assert len(list(out.glob("*.safetensors"))) == 7
    once = {file.name: 1 for file in source.glob("*.safetensors")}
    assert len(once) > 4
    assert opens == {"checkpoint": once, "headers": once}


@pytest.mark.slow
def test_live_sharded_save(saved, tmp_path):
    model, plan, *_ = saved
    quantize_model(model, plan).save_pretrained(tmp_path / "live", max_shard_size="50KB")
    assert len(Checkpoint(tmp_path / "live").files) > 3
    assert torch.equal(logits(load_model(tmp_path / "live")), logits(model))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["experts.7.w2.weight", "q_proj.weight", "gate.weight", "norm.weight"])
def test_a_checkpoint_that_lacks_a_weight(victim, tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "float")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del tensors[next(name for name in sorted(tensors, reverse=True) if name.endswith(victim))]
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks|cannot be quantized"):
        quantize_checkpoint(tmp_path / "float", allocate(model, group_size=64), tmp_path / "out")
    assert os.listdir(tmp_path) == ["float"]


def test_wrong_shapes_are_found_before_any_packing(saved, tmp_path, monkeypatch):
    """A lost or truncated weight of the last layer, when packing the others takes hours."""
    model, plan, source, out = saved
    monkeypatch.setattr(Packer, "write", lambda *_: pytest.fail("has packed"))
    model.save_pretrained(source.with_name("one"))
    file = source.with_name("one") / "model.safetensors"
    whole = load_file(file)
    expert = "model.layers.3.block_sparse_moe.experts.7.w2.weight"
    save_file({name: t for name, t in whole.items() if name != expert}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 7 of 8 experts for 'model\.layers\.3\.mlp\.experts\.down_proj'"):
        quantize_checkpoint(file.parent, plan, out)
    norm = "model.layers.3.input_layernorm.weight"
    save_file(whole | {norm: whole[norm][:32].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{norm}' has shape \(32,\), but its config.json says \(64,\)"):
        quantize_checkpoint(file.parent, plan, out)
    assert sorted(os.listdir(tmp_path)) == ["float", "one"]


@pytest.mark.slow
def test_weights_that_are_not_finite(saved, tmp_path):
    model, plan, source, out = saved
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.experts.down_proj")[2, 0, 0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(CheckpointError, match="down_proj"):
        quantize_checkpoint(source, plan, out)
    assert sorted(os.listdir(tmp_path)) == ["float"]


@pytest.mark.slow
def test_a_checkpoint_of_an_older_or_newer_format(saved):
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out)
    config = json.loads((out / "config.json").read_text())
    for version in (None, 1, 2, 4):
        config["quantization_config"]["format_version"] = version
        if version is None:
            del config["quantization_config"]["format_version"]
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            PlanError, match=f"has format version {version or 1}, this release of moe-precision reads 3"
        ):
            load_model(out)


@pytest.mark.parametrize("size", ["1.5GB", "5 elephants", "-1", 0, -5])
def test_sizes_that_are_none(size, saved):
    _, plan, source, out = saved
    with pytest.raises(ValueError, match=r"max_shard_size=.*expected bytes"):
        quantize_checkpoint(source, plan, out, max_shard_size=size)


def test_a_destination_that_holds_the_source(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "run")
    model.save_pretrained(tmp_path / "run" / "checkpoint-500")
    model.save_pretrained(tmp_path / "float")
    plan = allocate(model, group_size=64)
    with pytest.raises(CheckpointError, match=r"would be replaced, and '.*checkpoint-500' lies in it"):
        quantize_checkpoint(tmp_path / "run" / "checkpoint-500", plan, tmp_path / "run")
    plan.save(tmp_path / "run" / "plan.json")
    with pytest.raises(CheckpointError, match=r"would be replaced, and '.*plan.json' lies in it"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "run" / "plan.json", tmp_path / "run")


@pytest.mark.slow
def test_through_a_link(saved, tmp_path):
    _, plan, source, out = saved
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    quantize_checkpoint(source, plan, tmp_path / "link")
    assert (out / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.slow
def test_a_config_without_a_dtype(tmp_path):
    model = build("mixtral").bfloat16()
    model.save_pretrained(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(tmp_path / "float", allocate(model, group_size=64), tmp_path / "out")
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_under_either_name(stored, tmp_path):
    model = build("mixtral", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    plan = allocate(model, group_size=64)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(quantize_model(model, plan)))


# -- memory ----------------------------------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
import torch
from moe_precision.quantize.codec import fitting
from moe_precision.quantize.writer import quantize_checkpoint
fitting._ITERATIONS = 1  # the memory is the same
torch.set_num_threads(1)
torch.zeros(512, 512) @ torch.zeros(512, 512)  # whatever the first product maps
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[4]),) * 2)
quantize_checkpoint(*sys.argv[1:4], max_shard_size="20MB")
"""


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_checkpoint_larger_than_memory(tmp_path):
    """Three times the memory that the process may take beyond its imports: 2 layers of 25 MB in float, and a margin.

    The margin is for code that is loaded late and for the stacks of threads; what they take varies by 30 MB.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 24}
    with torch.device("meta"):
        model = build("mixtral", **sizes).bfloat16()
    model.to_empty(device="cpu")
    row = torch.randn(1024)
    for parameter in model.parameters():
        parameter.data.copy_(row[: parameter.shape[-1]])
    allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=128).save(tmp_path / "plan.json")
    model.save_pretrained(tmp_path / "float", max_shard_size="30MB")
    total = Checkpoint(tmp_path / "float").nbytes
    layer = total // 24
    allowed = 2 * layer + 140_000_000
    assert total > 3 * allowed
    paths = [str(tmp_path / name) for name in ("float", "plan.json", "out")]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOUNDED, *paths, str(allowed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert Checkpoint(tmp_path / "out").nbytes < total / 6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["ernie4_5_vl_moe", "jamba", "nemotron_h", "qwen3_vl_moe_text", "deepseek_v4"])
def test_conversions_of_other_families(model_type, tmp_path):
    """Two banks out of one conversion, hub names of several kinds, no gate: every tensor is that of the live model."""
    model = build_tiny(model_type).float()
    plan = allocate(model, method="uniform", average_bits=3, bits=(3,), group_size=16)
    model.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", max_shard_size="50KB")
    again = load_model(tmp_path / "out", dtype=torch.float32).state_dict()
    expected = quantize_model(model, plan).state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
