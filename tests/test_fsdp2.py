"""FSDP2 on two CPU processes gives the plan and the checkpoint of one process: no hook waits for a rank that left."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.checkpoints import load_model
from tests.test_cli import TEXT

ROOT = Path(__file__).parents[1]


def test_two_processes_agree_with_one(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for processes in (1, 2):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.fsdp2_run",
                str(tmp_path / str(processes)),
                str(tmp_path / "text.txt"),
                str(processes),
            ],
            check=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            timeout=300,
            capture_output=True,
        )
    one, two = (RouterNormHistory.load(tmp_path / n / "precision_plan.history.safetensors") for n in "12")
    assert one.steps == two.steps == [0, 2, 4]
    assert one.layers == two.layers
    for name in one.layers:
        torch.testing.assert_close(one.norms[name], two.norms[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.max_variance[name], two.max_variance[name], atol=1e-5, rtol=1e-5)
    plans = [PrecisionPlan.load(tmp_path / n / "precision_plan.json") for n in "12"]
    assert plans[0].diff(plans[1]) == []
    first, second = (load_model(tmp_path / n / "checkpoint").state_dict() for n in "12")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-4, rtol=1e-4)
