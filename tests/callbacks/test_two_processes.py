"""DDP and FSDP2 on two CPU processes give the plans and the checkpoint of one process: no hook waits for lost ranks."""

import socket
from pathlib import Path

import pytest
import torch

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.statistics import ExpertStatistics
from tests.cli.test_cli import TEXT
from tests.support import two_process_run
from tests.support.processes import finish, start


def run(folder: Path, strategy: str) -> tuple[RouterNormHistory, PrecisionPlan, dict]:
    (folder / "text.txt").write_text(TEXT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = 1 if strategy == "auto" else 2
    # as torchrun starts them
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    logs = [folder / f"rank_{rank}.txt" for rank in range(world)]
    ranks = [
        start(
            two_process_run.main,
            str(folder),
            strategy,
            log=log,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **({"TORCHELASTIC_RUN_ID": "test", **common} if world > 1 else {}),
        )
        for rank, log in enumerate(logs)
    ]
    finish(*ranks, logs=logs)
    history = RouterNormHistory.load(folder / "precision_plan.history.safetensors")
    return history, PrecisionPlan.load(folder / "precision_plan.json"), load_model(folder / "checkpoint").state_dict()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return *run(folder, "auto"), folder


@pytest.mark.slow
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
    found = [ExpertStatistics.load(f / "precision_plan.statistics.safetensors") for f in (one_process[3], tmp_path)]
    for name in one.layers:  # unasked; both processes see the same batches
        torch.testing.assert_close(2 * found[0].tokens[name], found[1].tokens[name], atol=8, rtol=1e-2)
        assert 2 * found[0].tokens[name].sum() == found[1].tokens[name].sum()
        for projection, diagonal in found[0].diagonals[name].items():
            torch.testing.assert_close(diagonal, found[1].diagonals[name][projection], atol=1e-3, rtol=5e-2)
    grids = [Grid.load(folder / "annealed_plan.grid.safetensors") for folder in (one_process[3], tmp_path)]
    assert grids[0].plan.diff(grids[1].plan) == []  # made by curvature in the middle of training
    for name in one.layers:
        torch.testing.assert_close(grids[0].scales[name], grids[1].scales[name], atol=1e-3, rtol=1e-2)
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], atol=1e-4, rtol=1e-4)
