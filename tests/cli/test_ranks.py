"""`quantize` by two processes, as torchrun starts them: the files of one process; where one ends, an error on both."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_precision import allocate
from moe_precision.cli.main import main
from moe_precision.quantize.writer.meeting import _met, environment
from moe_precision.quantize.writer.ranks import RankError, Ranks
from moe_precision.quantize.writer.shards import Shard, divided
from moe_precision.recording.collecting import collect_statistics
from tests.support.checkpoints import contents
from tests.support.models import build
from tests.support.processes import finish
from tests.support.ranks_run import command, several, start_ranks, until_killed


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("value", [None, "", "two", "9"])
def test_the_environment_is_whole_or_refused(variable, value, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == (0, 1)
    for name, given in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, given)
    assert environment() == (1, 4)
    monkeypatch.setenv(variable, value or "")
    if (variable, value) in {("MASTER_ADDR", "two"), ("MASTER_ADDR", "9"), ("MASTER_PORT", "9"), ("WORLD_SIZE", "9")}:
        environment()
        return
    with pytest.raises(RankError, match=f"{variable}.*torchrun.*unset WORLD_SIZE and RANK"):
        environment()
    assert main(["quantize", "no/checkpoint", "no/plan.json", "out"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_one_process_needs_no_address(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert environment() == (0, 1)


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        (["--statistics-batches", "2"], "leaves them beside the plan"),
        (["--distill-steps", "2"], "save it beside the plan"),
        (["--backend", "auto-round"], "run it in one process"),
    ],
)
def test_what_needs_the_whole_model_is_not_divided(more, way_out, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["quantize", "no/checkpoint", "no/plan.json", "out", *more]) == 2
    said = capsys.readouterr().err
    assert f"{' '.join(more[: 2 if more[0] == '--backend' else 1])} cannot be divided among ranks" in said
    assert way_out in said


def test_shards_are_divided_by_their_bytes():
    shards = [Shard(f"{number}", (), (), nbytes, 0) for number, nbytes in enumerate([3, 5, 4, 3, 3])]
    # 5 to the first, 4 to the second, 3 to the second (7), 3 to the first (8), 3 to the second (10)
    assert [[one.nbytes for one in own] for own in divided(shards, 2)] == [[5, 3], [3, 4, 3]]
    assert [[one.file for one in own] for own in divided(shards, 2)] == [["1", "3"], ["0", "2", "4"]]
    assert [len(own) for own in divided(shards, 7)] == [1, 1, 1, 1, 1, 0, 0]
    assert divided([], 2) == [[], []]


def test_one_process_waits_for_nobody():
    assert Ranks().gathered("said") == ["said"]
    Ranks().check()
    Ranks().check_same({"plan": "1"})


@pytest.mark.slow
def test_what_ranks_say_is_of_the_same_call():
    """Also in the second run of a process, and from one that is far ahead."""
    store = dist.HashStore()

    def said(rank):
        ranks = Ranks(rank, 2, store)
        return [ranks.gathered(f"{call} of {rank}") for call in range(5)]

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(said, range(2)))
    assert both == [[[f"{call} of 0", f"{call} of 1"] for call in range(5)]] * 2


@pytest.mark.slow
def test_ranks_meet_under_a_new_name_in_a_store_that_was_used():
    store = dist.HashStore()
    for key, said in (("hello/1", "dead 3"), ("hello/2", "dead 2")):  # of ranks that torchrun has killed
        store.set(key, said)

    def found(rank):
        part = _met(rank, 3, store)
        with Ranks(rank, 3, part).living():
            return part.get("from 0").decode() if rank else part.set("from 0", "met") or "met"

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(found, range(3))) == ["met"] * 3


def test_two_processes_of_one_rank():
    store, answered = dist.HashStore(), set()
    with ThreadPoolExecutor(2) as pool:
        both = []
        for _ in range(2):
            both.append(pool.submit(_met, 1, 2, store))
            while not (new := {store.get("hello/1").decode().split()[0]} - answered):
                time.sleep(0.01)
            answered |= new
            store.set(f"welcome/{new.pop()}", "part")  # as rank 0 does
        assert both[0].exception() is None
        with pytest.raises(RankError, match="two processes have RANK=1: give each its own, from 0 to 1"):
            both[1].result()


def finished(folder, out="out"):
    (partial,) = folder.glob(f".{out}.*.partial")
    return {file.name: file.stat().st_mtime_ns for file in partial.glob("model*.safetensors")}


@pytest.fixture
def saved(tmp_path):
    """A model of two layers, which makes five files, and its plan."""
    model = build("mixtral", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "float")
    allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=64).save(tmp_path / "plan.json")
    return model


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(saved, tmp_path, capsys):
    allocate(saved, method="uniform", average_bits=3, bits=(3,), group_size=64).save(tmp_path / "other.json")
    ids = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    collect_statistics(saved, [{"input_ids": ids}], text="seeded").save(tmp_path / "plan.statistics.safetensors")
    assert main(command(tmp_path, out="one")) == 0
    one = contents(tmp_path / "one")
    assert len([name for name in one if name.startswith("model-")]) == 5
    job = one["model-00001-of-00005.safetensors"][0]["moe_precision.set"]
    partial = tmp_path / f".resumed.{job[:12]}.partial"  # as an earlier run leaves it: two files missing, one damaged
    partial.mkdir()
    for number in (1, 2, 5):
        shutil.copy2(tmp_path / "one" / f"model-0000{number}-of-00005.safetensors", partial)
    damaged = partial / "model-00002-of-00005.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5] + b"wrong")
    before = finished(tmp_path, "resumed")

    finish(*start_ranks(several, tmp_path), logs=[tmp_path / f"rank_{rank}.txt" for rank in range(2)])
    first, second = (json.loads((tmp_path / f"said_{rank}.json").read_text()) for rank in range(2))
    assert contents(tmp_path / "out") == contents(tmp_path / "resumed") == one
    for name in ("whole", "resumed"):  # one of them speaks
        assert (first[name][0], *second[name]) == (0, 0, "", "")
    assert json.loads(first["whole"][1])["out"] == str(tmp_path / "out")
    assert "Quantizing: 100%" in first["whole"][2]
    assert "rounds under the statistics of" in first["resumed"][1]
    assert "goes on: 2 of 5 files were packed by an earlier run" in first["resumed"][2]
    times = {name: (tmp_path / "resumed" / name).stat().st_mtime_ns for name in before}
    assert [name for name in before if times[name] != before[name]] == [damaged.name]

    for said in (first, second):  # both end, with the same reason
        assert [said[name][0] for name in ("plan", "folder", "failed")] == [2, 2, 2]
        assert "rank 1 on" in said["plan"][2]
        assert "has another plan or width of other layers than rank 0 on" in said["plan"][2]
        assert "cannot see what rank 0 writes into" in said["folder"][2]
        assert said["failed"][2].count("a weight of layer 1 is not finite") == 1
    assert "error: rank 1 of 2 on" in first["failed"][2]
    assert "goes on from it with any number of ranks" in first["failed"][2]
    assert not list(tmp_path.glob(".other*")) + list(tmp_path.glob("here/.*")) + list(tmp_path.glob("there/*"))
    left = finished(tmp_path, "failed")
    assert len(left) >= 2
    capsys.readouterr()
    assert main(command(tmp_path, out="failed")) == 0  # by one process
    assert f"goes on: {len(left)} of 5 files" in capsys.readouterr().err
    assert contents(tmp_path / "failed") == one
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)]
)
def test_a_rank_that_is_killed_loses_its_file_alone(number, saved, tmp_path, capsys):
    first, second = ranks = start_ranks(until_killed, tmp_path)
    log = tmp_path / "rank_0.txt"
    while not (tmp_path / "waits").exists() or len(finished(tmp_path)) < 4:  # all of rank 0, one of rank 1
        assert all(one.is_alive() for one in ranks), log.read_text() + (tmp_path / "rank_1.txt").read_text()
        time.sleep(0.05)
    os.kill(second.pid, number)
    for process in (first, second):
        process.join(30)
    assert (first.exitcode, second.exitcode) == (2, -9 if number == signal.SIGKILL else 130)
    said, other = log.read_text(), (tmp_path / "rank_1.txt").read_text()
    assert "Traceback" not in said + other
    if number == signal.SIGKILL:
        assert "rank 1 of 2 has not been heard of for 1 seconds: it or its machine has died" in said
    else:
        assert "error: rank 1 of 2 on" in said
        assert "was interrupted; what is packed is kept" in said
        assert "quantize: interrupted; 4 packed files are kept in" in other
    before = finished(tmp_path)
    assert len(before) == 4
    assert not (tmp_path / "out").exists()
    assert main(command(tmp_path)) == 0
    assert "goes on: 4 of 5 files" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


KILLED_ONCE = """
import os, sys
from pathlib import Path
from moe_precision.cli.main import main
from moe_precision.quantize.writer.packer import Packer
write = Packer.write
def once(self, shard, *rest):
    if "00003-" in shard.file and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), 9)
    write(self, shard, *rest)
Packer.write = once
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.thorough
def test_torchrun_starts_killed_ranks_again(saved, tmp_path):
    (tmp_path / "script.py").write_text(KILLED_ONCE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    result = subprocess.run(
        [sys.executable, *launcher, "script.py", *command(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").exists()
    assert result.stdout.count("wrote") == 1
    assert "files were packed by an earlier run" in result.stderr
    assert main(command(tmp_path, out="one")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
