"""DeepSpeed ZeRO-3 itself, on two CPU processes; tests/test_wrappers.py has a stand-in for where it is not installed.

DS_BUILD_OPS=0 pip install deepspeed && pytest tests/test_zero3.py
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_norms_under_zero3(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29541",
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "tests.support.zero3_run", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=180)
        assert rank.returncode == 0, output.decode()[-3000:]
    for rank in (0, 1):
        for result in torch.load(tmp_path / f"result_{rank}.pt").values():
            assert "is a shard" in result["outside"]
            assert result["before"]["layers"] == result["expected"]["layers"]
            torch.testing.assert_close(result["before"]["norms"], result["expected"]["norms"], rtol=0, atol=0)
            torch.testing.assert_close(result["before"]["max_variance"], result["expected"]["max_variance"])
            assert not torch.equal(result["after"], result["before"]["norms"])  # a step was taken, and is seen
