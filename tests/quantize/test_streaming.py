"""Checkpoints are quantized in bounded memory, go on after a kill, and are never half there."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_precision import PlanError, allocate, quantize_model
from moe_precision.checkpoints.checkpoint import CheckpointError, load_model, tensor_bytes, weight_files
from moe_precision.quantize.writer import quantize_checkpoint
from tests.quantize.test_quantize import FAMILIES, mixed_plan
from tests.support.model_zoo import build_tiny
from tests.support.models import auto_class, build, logits


@pytest.fixture
def saved(tmp_path):
    """A float Mixtral on disk with a plan of 2 bits, whose packed layers are some 30 KB each."""
    model = build("mixtral", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "float", max_shard_size="300KB")
    plan = allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=64)
    return model, plan, tmp_path / "float", tmp_path / "out"


def contents(folder):
    """Everything that a folder holds: safetensors write their metadata in any order."""
    found = {}
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            found[file.name] = file.read_bytes()
            continue
        with safe_open(file, "pt") as opened:
            found[file.name] = opened.metadata(), {name: opened.get_tensor(name).tolist() for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_many_shards_are_what_the_live_model_is(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    plan = mixed_plan(model)
    quantize_checkpoint(tmp_path / "float", plan, tmp_path / "out", max_shard_size="1KB")
    assert len(weight_files(tmp_path / "out")) > 2
    again, info = auto_class(family).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(quantize_model(model, plan)))


def test_shards_hold_whole_layers_up_to_a_size(saved):
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out, max_shard_size="1MB")
    assert [file.name for file in weight_files(out)] == ["model.safetensors"]
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor_bytes(out).values())
    layers: dict[str, set] = {file: set() for file in index["weight_map"].values()}
    for name, file in index["weight_map"].items():
        layers[file] |= set(name.split(".")[2:3]) if ".layers." in name else set()
    assert sorted(map(len, layers.values())) == [0, 0, 0, 1, 1, 1, 1]  # embeddings, norm and head alone


def test_workers_write_the_same_bytes(saved):
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out, max_shard_size="100KB")
    quantize_checkpoint(source, plan, out.with_name("two"), max_shard_size="100KB", workers=2)
    assert contents(out) == contents(out.with_name("two"))
    with pytest.raises(ValueError, match="workers=0: expected at least 1"):
        quantize_checkpoint(source, plan, out, workers=0)


def test_live_sharded_save(saved, tmp_path):
    model, plan, *_ = saved
    quantize_model(model, plan).save_pretrained(tmp_path / "live", max_shard_size="50KB")
    assert len(weight_files(tmp_path / "live")) > 3
    assert torch.equal(logits(load_model(tmp_path / "live")), logits(model))


# -- interrupted -----------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from moe_precision import streaming
write = streaming._Packer.write
streaming._Packer.write = lambda *args: (write(*args), print(args[1].file, flush=True), time.sleep(0.3))
streaming.quantize_checkpoint(*sys.argv[1:4], max_shard_size="1KB")
"""


def test_a_killed_run_goes_on(saved, tmp_path, monkeypatch):
    _, plan, source, out = saved
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "plan.json"), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    done = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (partial,) = tmp_path.glob(".out.*.partial")
    times = {name: (partial / name).stat().st_mtime_ns for name in done}
    damaged = partial / done[0]
    damaged.write_bytes(damaged.read_bytes()[:-5] + b"wrong")
    quantize_checkpoint(source, plan, out, max_shard_size="1KB")
    assert not partial.exists()
    kept = [name for name in done if (out / name).stat().st_mtime_ns == times[name]]
    assert kept == done[1:]  # and the damaged one was written again
    quantize_checkpoint(source, plan, tmp_path / "whole", max_shard_size="1KB")
    assert contents(out) == contents(tmp_path / "whole")


def test_another_plan_does_not_go_on_from_it(saved, tmp_path, monkeypatch):
    model, plan, source, out = saved
    monkeypatch.setattr("shutil.copy2", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, plan, out)
    monkeypatch.undo()
    other = allocate(model, method="uniform", average_bits=3, bits=(3,), group_size=64)
    quantize_checkpoint(source, other, out)
    assert torch.equal(logits(load_model(out)), logits(quantize_model(model, other)))
    assert sorted(os.listdir(tmp_path)) == ["float", "out"]


FULL = """
import resource, sys
from moe_precision.streaming import quantize_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
quantize_checkpoint(*sys.argv[1:4], max_shard_size=1)
"""


def test_no_space_midway(saved, tmp_path):
    """The first shards fit, a later one does not: nothing appears at the destination, and a larger disk goes on."""
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    before = contents(out)
    other = allocate(build("mixtral", num_hidden_layers=4), method="uniform", average_bits=8, bits=(8,), group_size=64)
    other.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "plan.json"), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "OSError" in result.stderr
    assert contents(out) == before
    assert list(tmp_path.glob(".out.*.partial/model-*"))
    quantize_checkpoint(source, other, out, max_shard_size=1)
    assert not list(tmp_path.glob(".out.*"))
    assert torch.equal(logits(load_model(out)), logits(quantize_model(saved[0], other)))


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


def test_weights_that_are_not_finite(saved, tmp_path):
    model, plan, source, out = saved
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.experts.down_proj")[2, 0, 0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(CheckpointError, match="down_proj"):
        quantize_checkpoint(source, plan, out)
    assert sorted(os.listdir(tmp_path)) == ["float"]


def test_a_checkpoint_of_an_older_or_newer_format(saved):
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out)
    config = json.loads((out / "config.json").read_text())
    for version in (None, 1, 3):
        config["quantization_config"]["format_version"] = version
        if version is None:
            del config["quantization_config"]["format_version"]
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            PlanError, match=f"has format version {version or 1}, this release of moe-precision reads 2"
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


def test_through_a_link(saved, tmp_path):
    _, plan, source, out = saved
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    quantize_checkpoint(source, plan, tmp_path / "link")
    assert (out / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()


def test_one_writer_at_a_time(saved, tmp_path, monkeypatch):
    _, plan, source, out = saved

    def second(*_, **__):
        with pytest.raises(BlockingIOError, match="another process is writing into"):
            quantize_checkpoint(source, plan, out)
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copy2", second)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, plan, out)
    monkeypatch.undo()
    quantize_checkpoint(source, plan, out)
    assert sorted(os.listdir(tmp_path)) == ["float", "out"]


def test_a_changed_source_does_not_go_on(saved, tmp_path, monkeypatch):
    _, plan, source, out = saved
    monkeypatch.setattr("shutil.copy2", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, plan, out)
    monkeypatch.undo()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    quantize_checkpoint(source, plan, out)
    assert {t.dtype for n, t in load_model(out).state_dict().items() if n.endswith("proj.weight")} == {torch.float16}


def test_a_config_without_a_dtype(tmp_path):
    model = build("mixtral").bfloat16()
    model.save_pretrained(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(tmp_path / "float", allocate(model, group_size=64), tmp_path / "out")
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


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


KILLED_WORKER = """
import os, sys
from moe_precision import streaming
write = streaming._Packer.write
def once(self, shard, *rest):
    if "00005" in shard.file:
        os.kill(os.getpid(), 9)
    write(self, shard, *rest)
streaming._Packer.write = once
if __name__ == "__main__":
    streaming.quantize_checkpoint(*sys.argv[1:4], max_shard_size=1, workers=2)
"""


def test_a_killed_worker_leaves_what_is_finished(saved, tmp_path):
    _, plan, source, out = saved
    plan.save(tmp_path / "plan.json")
    (tmp_path / "script.py").write_text(KILLED_WORKER)
    command = [sys.executable, "script.py", str(source), str(tmp_path / "plan.json"), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "BrokenProcessPool" in result.stderr
    assert len(list(tmp_path.glob(".out.*.partial/model-*"))) >= 2
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    assert not list(tmp_path.glob(".out.*"))


# -- memory ----------------------------------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
import torch
from moe_precision.quantize import fitting
from moe_precision.streaming import quantize_checkpoint
fitting._ITERATIONS = 1  # the memory is the same
torch.set_num_threads(1)
torch.zeros(512, 512) @ torch.zeros(512, 512)  # whatever the first product maps
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[4]),) * 2)
quantize_checkpoint(*sys.argv[1:4], max_shard_size="20MB")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_checkpoint_larger_than_memory(tmp_path):
    """Four times the memory that the process may take beyond its imports: 2 layers of 25 MB in float, and some."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 24}
    model = build("mixtral", **sizes).bfloat16()
    plan = allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=128)
    plan.save(tmp_path / "plan.json")
    model.save_pretrained(tmp_path / "float", max_shard_size="30MB")
    total = sum(tensor_bytes(tmp_path / "float").values())
    layer = total // 24
    allowed = 2 * layer + 95_000_000
    assert total > 4 * allowed
    paths = [str(tmp_path / name) for name in ("float", "plan.json", "out")]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOUNDED, *paths, str(allowed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sum(tensor_bytes(tmp_path / "out").values()) < total / 6


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
