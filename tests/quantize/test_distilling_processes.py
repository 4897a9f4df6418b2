"""Two processes, each with batches of its own, distill the scales that one process gets from the batches of both."""

import socket

import pytest
import torch

from moe_precision.quantize.codec.grid import Grid
from tests.support import distilling_run
from tests.support.distilling_run import BATCHES, MODELS, batch, distilled, model_of
from tests.support.processes import finish, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files that two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    logs = [folder / f"rank_{rank}.txt" for rank in (0, 1)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} for rank in (0, 1)]  # as torchrun does
    finish(*(start(distilling_run.main, str(folder), r, log=logs[r], **common, **ranks[r]) for r in (0, 1)), logs=logs)
    return folder


def parts(grid: Grid) -> dict[str, torch.Tensor]:
    kinds = "scales", "offsets", "codes", "sums"
    return {f"{k}/{n}/{p}": x for k in kinds for n, of in getattr(grid, k).items() for p, x in of.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_agree_with_one(kind, folder):
    first, second = (Grid.load(folder / f"{kind}_{rank}.safetensors") for rank in (0, 1))
    assert all(map(torch.equal, parts(first).values(), parts(second).values()))
    model = model_of(kind)
    together = [torch.cat([batch(kind, rank, number) for rank in (0, 1)]) for number in range(BATCHES)]
    expected, found = distilled(model, together)
    errors, kept = torch.load(folder / f"{kind}_0.pt")
    assert [errors, kept] == torch.load(folder / f"{kind}_1.pt")
    assert kept == found.kept == []
    for name, pair in found.errors.items():
        assert errors[name] == pytest.approx(pair, rel=1e-3)
        assert pair[1] < 0.99 * pair[0]
    wanted = parts(expected)
    for name, values in parts(first).items():
        if name.startswith("codes"):
            assert torch.equal(values, wanted[name])
        else:  # scales are stored in eight bits: where sums in another order cross a border, they are a step apart
            torch.testing.assert_close(values, wanted[name], rtol=2e-2, atol=2e-2)
            assert (values == wanted[name]).double().mean() > 0.95


def test_of_a_run(folder):
    """Both processes of Lightning's DDP have the grid that stands beside the plan."""
    written = Grid.load(folder / "precision_plan.grid.safetensors")
    for rank in (0, 1):
        found = Grid.load(folder / f"lightning_{rank}.safetensors")
        assert all(map(torch.equal, parts(found).values(), parts(written).values()))


def test_what_fails_on_one_process_stops_both(folder):
    """A batch that fails, no batch at all, plans that differ, and experts that are sharded."""
    for rank, failed in enumerate(("it failed on another process", "TypeError")):
        batch, none, plans, sharded = torch.load(folder / f"said_{rank}.pt")
        assert failed in batch
        assert "there is no batch to distill on" in none
        assert "the processes of this run have made different plans" in plans
        assert "is sharded or behind an adapter, where scales cannot be distilled: save the model (merged)" in sharded
