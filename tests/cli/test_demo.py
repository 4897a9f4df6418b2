"""The demo on little text and with few steps: all files, a measured table, and a curve for every expert in wandb."""

import json

import pytest
from datasets import DatasetDict

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.checkpoints import Checkpoint, load_model
from moe_precision.cli import demo as demo_command
from moe_precision.cli.main import main
from moe_precision.recipes import corpus
from tests.support.processes import finish, start
from tests.support.wandb_file import read_artifacts, read_curves

STEPS = 12
ORDERS = ["paper's order", "reversed order", "random order"]


def run_on_little_text(folder):
    """The command, with half of the layers, on a fiftieth of the standard library, judged on less still."""
    recipe = demo_command._recipe()
    demo_command._recipe = lambda: recipe.replace("num_hidden_layers: 4", "num_hidden_layers: 2")
    whole = corpus.python_stdlib()
    every = {"train": 50, "validation": 200}
    little = DatasetDict({name: whole[name].select(range(0, len(whole[name]), step)) for name, step in every.items()})
    corpus.python_stdlib = lambda: little
    demo_command._SMALLER = (1.5,)  # one of the two smaller budgets takes all paths
    assert main(["demo", "--output", str(folder), "--max-steps", str(STEPS)]) == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run's folder and what the command printed; a process of its own, as a user starts it."""
    root = tmp_path_factory.mktemp("demo")
    folder, log = root / "run #1: a", root / "log.txt"
    finish(start(run_on_little_text, folder, log=log), logs=[log])
    return folder, log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_files(demo):
    folder, printed = demo
    plan = PrecisionPlan.load(folder / "precision_plan.json")
    history = RouterNormHistory.load(folder / "precision_plan.history.safetensors")
    assert history.steps == [0, 10, STEPS]
    assert 2.4 < plan.average_bits <= 2.5
    assert plan.method == "statistics"
    assert plan.baseline_step == 0
    assert plan.last_step == STEPS
    assert (folder / "router_norms.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "checkpoints").glob("*.ckpt"))
    plan.check(load_model(folder / "checkpoint"))
    assert str(folder) in printed


@pytest.mark.slow
def test_table(demo):
    folder, printed = demo
    rows = {row["model"]: row for row in json.loads((folder / "results.json").read_text())}
    assert list(rows) == [
        "float",
        "uniform 3 bits, no statistics",
        "uniform 2 bits, no statistics",
        "uniform 3 bits",
        "uniform 2 bits",
        *ORDERS,
        "plan",
        "plan, 1.5 bits",
        "plan, 1.5 bits, distilled",
    ]
    plan = PrecisionPlan.load(folder / "precision_plan.json")
    assert rows["float"]["stored_bits"] == 16
    for name in ORDERS:
        assert rows[name]["nominal_bits"] == 2.5
        assert rows[name]["stored_bits"] == pytest.approx(2.5 + 18 / 64, abs=0.01)
    for name, bits in {"plan": 2.5, "plan, 1.5 bits": 1.5, "plan, 1.5 bits, distilled": 1.5}.items():
        assert bits - 0.1 < rows[name]["nominal_bits"] <= bits
        assert rows[name]["stored_bits"] <= bits + 18 / 64 + 0.01
    plain, distilled = rows["plan, 1.5 bits"], rows["plan, 1.5 bits, distilled"]
    assert distilled["divergence"]["kl"] != plain["divergence"]["kl"]
    assert distilled["file_mb"] == pytest.approx(plain["file_mb"], rel=0.01)
    measured = Checkpoint(folder / "quantized-plan").stored_bits_per_expert_weight(plan)
    assert rows["plan"]["stored_bits"] == measured
    assert rows["uniform 2 bits"]["file_mb"] < rows["plan"]["file_mb"] < rows["uniform 3 bits"]["file_mb"]
    assert rows["uniform 3 bits"]["file_mb"] < rows["float"]["file_mb"]
    for name, row in rows.items():
        assert row["evaluation"]["loss"] < 8  # untrained: ln(2048) = 7.6
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name} "))
        assert f"{row['evaluation']['loss']:.4f}" in line
        if name == "float":
            assert row["divergence"] is None
        else:
            cells = [cell.strip() for cell in line.split("|")]
            assert f"{row['divergence']['kl']:.5f}" in cells
            assert f"{row['divergence']['top1']:.1%}" in cells
            assert row["divergence"]["tokens"] == row["evaluation"]["tokens"]
    assert 0 < rows["uniform 3 bits"]["divergence"]["kl"] < rows["uniform 2 bits"]["divergence"]["kl"]
    for name in ("uniform 3 bits", "uniform 2 bits"):
        assert rows[name]["divergence"]["kl"] < rows[f"{name}, no statistics"]["divergence"]["kl"]
    assert not list(folder.glob("*undistilled"))


@pytest.mark.slow
def test_wandb_holds_a_curve_for_each_expert_of_each_layer(demo):
    folder, _ = demo
    history = RouterNormHistory.load(folder / "precision_plan.history.safetensors")
    (path,) = (folder / "wandb").rglob("*.wandb")
    curves = read_curves(path)
    for index, norms in enumerate(history.norms.values()):
        assert norms.shape[1] == 8
        for expert in range(8):
            curve = curves[f"router_norm/layer_{index:02d}/expert_{expert:03d}"]
            assert [step for step, _ in curve] == history.steps
            assert [value for _, value in curve] == pytest.approx(norms[:, expert].tolist())
    assert any(artifact.type == "precision-plan" for artifact in read_artifacts(path))
