"""DDP and FSDP2 on two CPU processes give the plans and the checkpoint of one process: no hook waits for lost ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.curvature import Curvature
from tests.cli.test_cli import TEXT

ROOT = Path(__file__).parents[2]


def run(folder: Path, strategy: str) -> tuple[RouterNormHistory, PrecisionPlan, dict]:
    (folder / "text.txt").write_text(TEXT)
    subprocess.run(
        [sys.executable, "-m", "tests.support.two_process_run", str(folder), str(folder / "text.txt"), strategy],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
        capture_output=True,
    )
    history = RouterNormHistory.load(folder / "precision_plan.history.safetensors")
    return history, PrecisionPlan.load(folder / "precision_plan.json"), load_model(folder / "checkpoint").state_dict()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return *run(folder, "auto"), folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_agree_with_one(strategy, one_process, tmp_path):
    one, plan, weights, _ = one_process
    two, other_plan, other_weights = run(tmp_path, strategy)
    assert one.steps == two.steps == [0, 2, 4]
    assert one.layers == two.layers
    for name in one.layers:
        torch.testing.assert_close(one.norms[name], two.norms[name], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one.max_variance[name], two.max_variance[name], atol=1e-6, rtol=1e-6)
        assert one.loads["training"][name][0].sum() == 4 * 4 * 32 * 2  # steps, rows, tokens, experts per token
        # both processes see the same batches, and a choice between two experts may depend on the last bit
        torch.testing.assert_close(2 * one.loads["training"][name], two.loads["training"][name], atol=4, rtol=1e-2)
        assert two.loads["training"][name][0].sum() == 2 * one.loads["training"][name][0].sum()
    assert plan.diff(other_plan) == []
    assert [layer.order for layer in plan.layers.values()] == [layer.order for layer in other_plan.layers.values()]
    curvatures = [Curvature.load(f / "precision_plan.curvature.safetensors") for f in (one_process[3], tmp_path)]
    for name in one.layers:  # squares of small gradients, summed in another order
        torch.testing.assert_close(curvatures[0].rows[name], curvatures[1].rows[name], atol=0, rtol=1e-3)
        torch.testing.assert_close(curvatures[0].columns[name], curvatures[1].columns[name], atol=0, rtol=1e-3)
    grids = [Grid.load(folder / "annealed_plan.grid.safetensors") for folder in (one_process[3], tmp_path)]
    assert grids[0].plan.diff(grids[1].plan) == []  # made by curvature in the middle of training
    for name in one.layers:
        torch.testing.assert_close(grids[0].scales[name], grids[1].scales[name], atol=1e-3, rtol=1e-2)
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], atol=1e-4, rtol=1e-4)
