"""FSDP1 keeps flat shards: norms and variances are read unit by unit, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_norms_under_raw_fsdp1(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.fsdp1_run", str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=180)
        assert rank.returncode == 0, errors.decode()[-3000:]
    for rank in (0, 1):
        saved = torch.load(tmp_path / f"result_{rank}.pt")
        expected, results = saved["expected"], saved["results"]
        assert len(results) == 12
        for case, result in results.items():
            if case.endswith("outside"):
                assert "is a shard" in result, case
            elif case.endswith("still sharded"):
                assert result, case
            else:
                assert result["layers"] == expected["layers"], case
                torch.testing.assert_close(result["norms"], expected["norms"], rtol=0, atol=0)
                torch.testing.assert_close(result["max_variance"], expected["max_variance"])
