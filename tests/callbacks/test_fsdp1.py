"""FSDP1 keeps flat shards: norms and variances are read unit by unit, or not at all."""

import pytest
import torch

from tests.support import fsdp1_run
from tests.support.processes import finish, start


@pytest.mark.slow
def test_norms_under_raw_fsdp1(tmp_path):
    logs = [tmp_path / f"rank_{rank}.txt" for rank in (0, 1)]
    finish(*(start(fsdp1_run.main, str(tmp_path), rank, log=logs[rank]) for rank in (0, 1)), logs=logs)
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
