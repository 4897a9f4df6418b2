"""A training loop without a Trainer: what `RunRecorder` counts, reads and writes."""

import pytest
import torch
from lightning_fabric import Fabric

from moe_precision import HistoryError, PrecisionPlan, RouterNormHistory, RunRecorder, allocate
from moe_precision.plans.beside import PlanFiles
from tests.layers.test_layouts import megatron
from tests.support.models import PlainMoE, build

ROWS = torch.randint(3, 128, (6, 2, 8), generator=torch.Generator().manual_seed(0))  # batches of 2 rows of 8 tokens


def loop(model, steps, recorder, optimizer, first=1):
    """Trains for some steps; what `after_step` returned."""
    found = []
    for step in range(first, first + steps):
        rows = ROWS[step - 1]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(recorder.after_step(step, last=step == first + steps - 1))
    return found


@pytest.fixture
def model():
    return build("mixtral", num_hidden_layers=1).train()


def norms(model):
    return model.model.layers[0].mlp.gate.weight.detach().norm(dim=1)


def test_norms_and_tokens_of_a_loop(model):
    before = norms(model).clone()
    with RunRecorder(model, every_n_steps=2) as recorder:
        metrics = loop(model, 5, recorder, torch.optim.AdamW(model.parameters(), lr=1e-2))
    history = recorder.history
    assert history.steps == [0, 2, 4, 5]
    name = "model.layers.0.mlp"
    torch.testing.assert_close(history.first[name], before)
    torch.testing.assert_close(history.last[name], norms(model))
    assert history.loads["training"][name][0].sum() == 5 * 16 * 2  # steps, tokens, experts of a token
    assert [bool(found) for found in metrics] == [False, True, False, True, True]
    assert metrics[-1]["router_norm/layer_00/expert_000"] == pytest.approx(float(norms(model)[0]))
    shares = [metrics[-1][f"expert_load/layer_00/{key}"] for key in ("min", "median", "max")]
    assert shares == sorted(shares)
    model(input_ids=ROWS[0])  # no hook is left
    assert history.loads["training"][name][0].sum() == 5 * 16 * 2


def test_a_validation_is_counted_apart(model):
    with RunRecorder(model) as recorder:
        for rows in (ROWS, ROWS[:2]):  # the last one stays
            with recorder.validation(), torch.no_grad():
                for row in rows:
                    model(input_ids=row)
        loop(model, 1, recorder, torch.optim.AdamW(model.parameters()))
    (validation,), (training,) = (list(recorder.history.loads[kind].values()) for kind in ("validation", "training"))
    assert (validation[0].sum(), training[0].sum()) == (2 * 16 * 2, 16 * 2)


@pytest.mark.slow
def test_files_are_those_of_a_run(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with RunRecorder(model) as recorder:
        loop(model, 2, recorder, optimizer)
    curvature, statistics = recorder.curvature(optimizer), recorder.statistics([{"input_ids": row} for row in ROWS])
    recorded = {"history": recorder.history, "curvature": curvature, "statistics": statistics}
    plan = allocate(model=model, **recorded, average_bits=2, group_size=64)
    assert plan.method == "statistics"
    files = recorder.save(tmp_path / "plan.json", plan, curvature, statistics)
    assert files == PlanFiles(tmp_path / "plan.json")
    assert [path for path in files.all if path.is_file()] == [
        files.plan,
        files.history,
        files.curvature,
        files.statistics,
    ]
    assert PrecisionPlan.load(files.plan).diff(plan) == []


def test_files_of_an_earlier_run_are_not_left_beside_the_plan(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with RunRecorder(model) as recorder:
        loop(model, 1, recorder, optimizer)
    plan = allocate(model, history=recorder.history, method="router_norm", average_bits=2.5, group_size=64)
    recorder.save(tmp_path / "plan.json", plan, recorder.curvature(optimizer))
    files = recorder.save(tmp_path / "plan.json", plan)
    assert [path for path in files.all if path.is_file()] == [files.plan, files.history]


def test_a_layout_stays_in_the_history(tmp_path):
    with RunRecorder(megatron(), layout="megatron") as recorder:
        recorder.history.save(tmp_path / "x.history.safetensors")
    assert recorder.layers[0].num_experts == 4
    assert RouterNormHistory.load(tmp_path / "x.history.safetensors").patterns == {"layout": "megatron"}


def test_the_last_record_is_of_the_weights_that_are_left(model):
    with RunRecorder(model) as recorder:
        loop(model, 2, recorder, torch.optim.AdamW(model.parameters(), lr=1e-2))
        with torch.no_grad():  # the best checkpoint is loaded
            model.model.layers[0].mlp.gate.weight.mul_(2)
        recorder.after_step(2, last=True)
        torch.testing.assert_close(recorder.history.last["model.layers.0.mlp"], norms(model))
        assert recorder.history.steps == [0, 1, 2]
    with (
        RunRecorder(model, history=recorder.history) as again,
        pytest.raises(ValueError, match="got step 1, and step 2 is recorded already: count on from the history"),
    ):
        again.after_step(1)


def test_a_loop_goes_on_from_a_history(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with RunRecorder(model) as recorder:
        loop(model, 2, recorder, optimizer)
    recorder.history.save(tmp_path / "x.history.safetensors")
    history = RouterNormHistory.load(tmp_path / "x.history.safetensors")
    with RunRecorder(model, history=history) as again:
        loop(model, 2, again, optimizer, first=3)
    assert again.history.steps == [0, 1, 2, 3, 4]
    assert again.history.loads["training"]["model.layers.0.mlp"][0].sum() == 4 * 16 * 2
    with pytest.raises(HistoryError, match=r"of other layers \(1 of 'mixtral'\) than the model has \(1 of 'PlainMoE'"):
        RunRecorder(PlainMoE(), history=history)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        RunRecorder(model, every_n_steps=0)


@pytest.mark.slow
def test_fabric_and_a_module_of_ones_own(tmp_path):
    """Experts in a plain list: each token goes to one, and no routing weight is seen."""
    torch.manual_seed(0)
    own = PlainMoE()
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(own, torch.optim.AdamW(own.parameters(), lr=1e-2))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(4)
    with RunRecorder(model) as recorder:
        for step in (1, 2):
            expected += torch.bincount(own.router(x).argmax(-1), minlength=4)
            fabric.backward(model(x).square().sum())
            optimizer.step()
            optimizer.zero_grad()
            recorder.after_step(step)
    (load,) = recorder.history.loads["training"].values()
    assert load[0].tolist() == expected.tolist()
    assert load[1].isnan().all()
    statistics = recorder.statistics([x])
    (tokens,) = statistics.tokens.values()
    assert tokens.tolist() == torch.bincount(own.router(x).argmax(-1), minlength=4).tolist()
    recorded = {"curvature": recorder.curvature(optimizer), "statistics": statistics, "group_size": 32}
    plan = allocate(model=own, history=recorder.history, average_bits=2, **recorded)
    assert plan.method == "statistics"
    assert plan.average_bits == pytest.approx(2, abs=0.1)
