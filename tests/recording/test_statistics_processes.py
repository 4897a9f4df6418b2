"""Two processes, each with batches of its own, get the statistics that one process gets from all of them."""

import socket

import pytest
import torch
from safetensors.torch import load_file

from moe_precision import find_moe_layers
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.in_turn import turns
from moe_precision.recording.statistics import ExpertStatistics
from tests.support import statistics_run, trainer_run
from tests.support.models import build
from tests.support.processes import finish, start
from tests.support.statistics_run import BATCHES, STEPS, batch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "model_type"), [("ddp", "mixtral"), ("ddp", "switch_transformers"), ("fsdp2", "mixtral")]
)
def test_two_processes_agree_with_one(strategy, model_type, tmp_path):
    logs = [tmp_path / f"rank_{rank}.txt" for rank in (0, 1)]
    arguments = strategy, model_type
    finish(*(start(statistics_run.main, str(tmp_path), rank, *arguments, log=logs[rank]) for rank in (0, 1)), logs=logs)
    model = build(model_type)
    expected = collect_statistics(model, [batch(model_type, rank, i) for rank in (0, 1) for i in range(BATCHES)])
    for rank in (0, 1):
        assert_alike(ExpertStatistics.load(tmp_path / f"after_{rank}.safetensors"), expected)
    parts = {}
    for turn in turns(find_moe_layers(model), 0, STEPS):
        steps = range(turn.first, turn.end)
        in_turn = collect_statistics(model, [batch(model_type, rank, i) for rank in (0, 1) for i in steps])
        parts |= {layer.name: in_turn for layer in turn.layers}
    for rank in (0, 1):
        found = ExpertStatistics.load(tmp_path / f"during_{rank}.safetensors")
        for name, of_turn in parts.items():
            assert_alike(found, of_turn, [name])
    said = [torch.load(tmp_path / f"said_{rank}.pt")["error"] for rank in (0, 1)]
    assert "it failed on another process" in said[0]
    assert "only here" in said[1]


@pytest.mark.slow
def test_transformers_trainer_on_two_processes(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    logs = [tmp_path / f"rank_{rank}.txt" for rank in (0, 1)]
    ranks = [
        start(trainer_run.main, str(tmp_path), log=log, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, log in enumerate(logs)
    ]
    finish(*ranks, logs=logs)
    for name, text, batches in (("after", "4 training batches of the run", 2), ("during", "the last 50 % of", 2)):
        written = ExpertStatistics.load(tmp_path / name / "precision_plan.statistics.safetensors")
        assert written.text.startswith(text)
        for rank in (0, 1):
            assert_alike(ExpertStatistics.load(tmp_path / f"{name}_{rank}.safetensors"), written)
        for tokens in written.tokens.values():
            assert tokens.sum() == batches * 2 * 2 * 10 * 2  # batches, processes, rows, tokens, experts per token
    # annealing begins and ends on the same codes on both
    first, second = (torch.load(tmp_path / f"annealed_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    grids = [Grid.load(tmp_path / f"annealed_{rank}.safetensors") for rank in (0, 1)]
    for layer, scales in grids[0].scales.items():
        assert all(torch.equal(scale, grids[1].scales[layer][name]) for name, scale in scales.items())
    assert "statistics of the training steps before annealing" in logs[0].read_text()
    files = [
        tmp_path / "after" / "precision_plan.grid.safetensors",
        *(tmp_path / f"grid_{r}.safetensors" for r in (0, 1)),
    ]
    written, *of_ranks = (load_file(file) for file in files)
    for found in of_ranks:  # with distilled scales
        assert all(torch.equal(tensor, written[name]) for name, tensor in found.items())


def assert_alike(found: ExpertStatistics, expected: ExpertStatistics, names: list[str] | None = None) -> None:
    for name in names or list(expected.tokens):
        assert torch.equal(found.tokens[name], expected.tokens[name])
        torch.testing.assert_close(found.router_norms[name], expected.router_norms[name])
        for kind in ("diagonals", "correlations"):
            torch.testing.assert_close(getattr(found, kind)[name], getattr(expected, kind)[name], rtol=1e-3, atol=1e-3)
