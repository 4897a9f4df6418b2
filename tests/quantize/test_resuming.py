"""However `quantize_checkpoint` ends early, its finished shards stay, and the same call resumes from them."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest
import torch

from moe_precision import PlanQuantizationConfig, allocate, quantize_model
from moe_precision.checkpoints import Checkpoint, CheckpointError, load_model
from moe_precision.quantize import PlanHfQuantizer
from moe_precision.quantize.writer import quantize_checkpoint
from moe_precision.quantize.writer.packer import Packer
from moe_precision.quantize.writer.resume import parts
from tests.support.checkpoints import contents, save_float
from tests.support.models import build, logits
from tests.support.processes import start


@pytest.fixture
def saved(tmp_path):
    return save_float(tmp_path)


def quantize_slowly(source, plan, out, finished):
    """Adds the name of every finished shard to a file, and waits after the third."""
    write = Packer.write

    def write_and_wait(self, shard, *rest):
        write(self, shard, *rest)
        with open(finished, "a") as file:
            print(shard.file, file=file)
        if len(finished.read_text().split()) > 2:
            time.sleep(60)

    Packer.write = write_and_wait
    quantize_checkpoint(source, plan, out, max_shard_size="1KB")


@pytest.mark.slow
def test_a_killed_run_goes_on(saved, tmp_path, monkeypatch):
    _, plan, source, out = saved
    names, log = tmp_path / "finished.txt", tmp_path / "log.txt"
    process = start(quantize_slowly, source, plan, out, names, log=log)
    while not names.exists() or names.read_text().count("\n") < 3:
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    done = names.read_text().split()[:3]
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


def finished(folder):
    """Shards that a run left beside its destination, with what changes when a file is written again."""
    (partial,) = folder.glob(".out.*.partial")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in partial.glob("model-*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "cannot be quantized: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "cannot be quantized: CUDA out of memory"),
        (ValueError("no such conversion"), "cannot be quantized: .*no such conversion"),
        (KeyboardInterrupt(), ""),
    ],
    ids=["memory", "memory of a GPU", "value", "interrupt"],
)
def test_an_error_in_a_conversion_leaves_finished_shards(error, message, saved, tmp_path, monkeypatch):
    """transformers keeps what a conversion raises as text, so that running out of memory comes as a ValueError."""
    _, plan, source, out = saved
    pack = PlanHfQuantizer.pack

    def failing(self, model, name, weight):
        if ".layers.1." in name:
            raise error
        pack(self, model, name, weight)

    monkeypatch.setattr(PlanHfQuantizer, "pack", failing)
    for _ in range(2):  # the second run continues, and meets the error again
        with pytest.raises((CheckpointError, KeyboardInterrupt), match=message):
            quantize_checkpoint(source, plan, out, max_shard_size=1)
        before = finished(tmp_path)
        assert sorted(before) == ["model-00001-of-00007.safetensors", "model-00002-of-00007.safetensors"]
        assert not out.exists()
    monkeypatch.undo()
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in before} == before
    assert not list(tmp_path.glob(".out.*"))
    quantize_checkpoint(source, plan, tmp_path / "whole", max_shard_size=1)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.thorough
def test_an_error_in_a_worker_leaves_finished_shards(saved, tmp_path):
    model, plan, source, out = saved
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.experts.down_proj")[2, 0, 0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(CheckpointError, match="down_proj"):
        quantize_checkpoint(source, plan, out, max_shard_size=1, workers=2)
    assert "model-00001-of-00007.safetensors" in finished(tmp_path)


@pytest.mark.slow
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


def quantize_on_a_small_disk(source, plan, out):
    """No file may be larger than 60 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    quantize_checkpoint(source, plan, out, max_shard_size=1)


@pytest.mark.slow
def test_no_space_midway(saved, tmp_path):
    """The first shards fit, a later one does not: nothing appears at the destination, and a larger disk resumes it."""
    _, plan, source, out = saved
    quantize_checkpoint(source, plan, out, max_shard_size=1)
    before = contents(out)
    other = allocate(build("mixtral", num_hidden_layers=4), method="uniform", average_bits=8, bits=(8,), group_size=64)
    log = tmp_path / "log.txt"
    process = start(quantize_on_a_small_disk, source, other, out, log=log)
    process.join()
    assert process.exitcode == 1
    assert "OSError" in log.read_text()
    assert contents(out) == before
    assert list(tmp_path.glob(".out.*.partial/model-*"))
    quantize_checkpoint(source, other, out, max_shard_size=1)
    assert not list(tmp_path.glob(".out.*"))
    assert torch.equal(logits(load_model(out)), logits(quantize_model(saved[0], other)))


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_copy_of_one_size_and_time_is_another_source(saved):
    _, plan, source, _ = saved
    file = next(source.glob("*.safetensors"))
    quantization = PlanQuantizationConfig(plan)

    def hashes():
        with Checkpoint(source) as checkpoint:
            return parts(checkpoint, quantization, [])

    before, times = hashes(), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert {part for part, value in hashes().items() if value != before[part]} == {"checkpoint"}


KILLED_WORKER = """
import os, sys
from moe_precision.quantize.writer import quantize_checkpoint
from moe_precision.quantize.writer.packer import Packer
write = Packer.write
def once(self, shard, *rest):
    if "00005" in shard.file:
        os.kill(os.getpid(), 9)
    write(self, shard, *rest)
Packer.write = once
if __name__ == "__main__":
    quantize_checkpoint(*sys.argv[1:4], max_shard_size=1, workers=2)
"""


@pytest.mark.thorough
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
