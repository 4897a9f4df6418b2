"""DeepSpeed ZeRO-3 itself, on two CPU processes; layers/test_wrappers.py has a stand-in for it."""

import importlib.util

import pytest
import torch

from tests.support import zero3_run
from tests.support.processes import finish, start


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_norms_under_zero3(tmp_path):
    # DeepSpeed asks for an address and a port; the processes meet in a file
    environment = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    logs = [tmp_path / f"rank_{rank}.txt" for rank in (0, 1)]
    ranks = [
        start(zero3_run.main, str(tmp_path), rank, log=logs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in (0, 1)
    ]
    finish(*ranks, logs=logs)
    for rank in (0, 1):
        for result in torch.load(tmp_path / f"result_{rank}.pt").values():
            assert "is a shard" in result["outside"]
            assert result["before"]["layers"] == result["expected"]["layers"]
            torch.testing.assert_close(result["before"]["norms"], result["expected"]["norms"], rtol=0, atol=0)
            torch.testing.assert_close(result["before"]["max_variance"], result["expected"]["max_variance"])
            assert not torch.equal(result["after"], result["before"]["norms"])  # a step was taken, and is seen
