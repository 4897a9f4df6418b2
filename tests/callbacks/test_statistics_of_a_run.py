"""Statistics that the callbacks collect after the last step: those of the same batches, with the model left alone."""

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

from moe_precision import PrecisionPlan, RouterNormHistory, allocate, find_moe_layers, quantize_model
from moe_precision.callbacks import (
    PrecisionAnneal,
    RouterNormMonitor,
    RouterNormTrainerCallback,
    plan_of_run,
    statistics_recorder,
)
from moe_precision.plans.settings import PlanSettings
from moe_precision.recording import collecting
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.statistics import ExpertStatistics, StatisticsError
from tests.callbacks.test_router_norm_monitor import Module, TwoOptimizers, data, monitor, trainer
from tests.support.models import build

pytestmark = pytest.mark.slow

NAME = "precision_plan.statistics.safetensors"


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (12, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


class Own(nn.Module):
    """A linear layer that is no nn.Linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class OfAModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build("mixtral").train()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def assert_alike(found: ExpertStatistics, expected: ExpertStatistics) -> None:
    for name, tokens in expected.tokens.items():
        assert torch.equal(found.tokens[name], tokens)
        for kind in ("diagonals", "correlations"):
            torch.testing.assert_close(getattr(found, kind)[name], getattr(expected, kind)[name], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("error:the plan was made by")
def test_of_a_transformers_model_under_lightning(tmp_path):
    module, batches = OfAModel(), DataLoader(rows(), batch_size=3)
    callback = RouterNormMonitor(group_size=64, statistics_batches=2)
    trainer(tmp_path, callback, max_epochs=1, max_steps=-1).fit(module, batches)
    found = ExpertStatistics.load(tmp_path / NAME)
    assert found.text == "2 training batches of the run that the plan is of"
    assert module.model.training
    assert not any(one._forward_pre_hooks for one in module.modules())
    assert_alike(found, collect_statistics(module.model, list(batches)[:2]))
    loads = callback.history.loads["training"]
    assert all(load[0].sum() == 12 * 10 * 2 for load in loads.values())  # the extra batches are not counted
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert (plan.method, plan.last_step, plan.baseline_step) == ("statistics", 4, 0)
    assert plan.notes["auto"] == "there are curvature and expert statistics"
    known = {"curvature": callback.curvature, "statistics": found, "group_size": 64}
    expected = allocate(module.model, callback.history, calibration=batches, **known)
    assert plan.diff(expected) == []
    assert plan.notes["calibration_tokens"] == expected.notes["calibration_tokens"] == 108
    assert plan.diff(allocate(module.model, callback.history, **known)) != []
    quantize_model(module.model, tmp_path / "precision_plan.json")  # with the files beside it: no warning


def test_a_loader_is_gone_through_once_for_each_pass(tmp_path, monkeypatch):
    module, batches = OfAModel(), DataLoader(rows(), batch_size=3)
    monkeypatch.setattr(collecting, "passes", lambda layers, *memory: [collecting.Group([layer]) for layer in layers])
    callback = RouterNormMonitor(group_size=64, statistics_batches=2)
    trainer(tmp_path, callback, max_epochs=1, max_steps=-1).fit(module, batches)
    monkeypatch.undo()
    assert_alike(callback.statistics, collect_statistics(module.model, list(batches)[:2]))
    assert callback.statistics.text.startswith("2 training batches")


def test_of_a_module_through_its_training_step(tmp_path):
    class Normed(Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def loss(self, x):
            return super().loss(self.norm(x))

    module, callback = Normed(), monitor(statistics_batches=100)
    with pytest.warns(UserWarning, match="there are 6 batches to take statistics from, of 100"):
        trainer(tmp_path, callback).fit(module, data())
    assert module.norm.num_batches_tracked == 6  # of training alone
    assert all(parameter.grad is None for parameter in module.parameters())
    found = ExpertStatistics.load(tmp_path / NAME)
    assert found.text == "6 training batches of the run that the plan is of"
    assert sum(int(tokens.sum()) for tokens in found.tokens.values()) == 2 * 6 * 8
    trainer(tmp_path, monitor(statistics_batches=0)).fit(Module(), data())  # a later run that collects none
    assert not (tmp_path / NAME).exists()


def test_of_transformers_trainer(tmp_path):
    model, callback = build("mixtral").train(), RouterNormTrainerCallback(group_size=64, statistics_batches=2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    HFTrainer(model, arguments, train_dataset=rows(), callbacks=[callback]).train()
    found = ExpertStatistics.load(tmp_path / NAME)
    expected = collect_statistics(model, list(DataLoader(rows(), batch_size=3))[:2])
    assert_alike(found, expected)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics_batches": -1}, "statistics_batches must be at least 0 or None, got -1"),
        ({"statistics_from": 1.0}, "statistics_from must be a share of training between 0 and 1, got 1.0"),
        ({"statistics_batches": 2, "statistics_from": 0.9}, "are two ways to collect the same; give one"),
        ({"method": "statistics", "statistics_batches": 0}, "method 'statistics' needs expert statistics, and"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        monitor(**arguments)


@pytest.mark.parametrize("arguments", [{"statistics_batches": 2}, {"statistics_from": 0.5}])
def test_a_module_that_steps_itself(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"statistics_.*=.* needs automatic optimization"):
        trainer(tmp_path, monitor(**arguments)).fit(TwoOptimizers(), data())


def test_experts_that_no_hook_sees_are_said_before_training(tmp_path):
    class Bilinear(Module):
        def __init__(self):
            super().__init__()
            for expert in self.model[0].experts:
                expert[0] = Own(32, 64)

    with pytest.raises(StatisticsError, match="cannot be seen: expected transformers'"):
        trainer(tmp_path, monitor(statistics_batches=2)).fit(Bilinear(), data())
    trainer(tmp_path, monitor()).fit(Bilinear(), data())
    assert (tmp_path / "precision_plan.json").is_file()
    assert not (tmp_path / NAME).exists()


def test_a_model_that_is_not_finite_stops_nobody(tmp_path):
    class Diverging(Module):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.model[1].experts[2][0].weight.fill_(float("nan"))

    with pytest.warns(UserWarning, match="no statistics are written: .*not finite"):
        trainer(tmp_path, monitor(statistics_batches=2)).fit(Diverging(), data())
    assert not (tmp_path / NAME).exists()


def test_a_disk_that_is_too_small_is_said_before_training(tmp_path, monkeypatch):
    module = Module()
    monkeypatch.setattr(statistics_recorder, "_free", lambda folder: 1000)
    module.on_train_epoch_start = lambda: pytest.fail("training has begun")
    with (
        pytest.warns(UserWarning, match=r"take a file of .* MB, and '.*' has 0\.0 MB left\. Make room before training"),
        pytest.raises(pytest.fail.Exception, match="training has begun"),
    ):
        trainer(tmp_path, monitor(statistics_batches=2)).fit(module, data())


def test_without_moments_the_default_takes_squared_gradients(tmp_path, caplog):
    """And the log says so."""

    class ByGradient(OfAModel):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = RouterNormMonitor(group_size=64, average_bits=1.5)
    trainer(tmp_path, callback, max_epochs=1, max_steps=-1).fit(ByGradient(), DataLoader(rows(), batch_size=3))
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert (plan.method, plan.granularity) == ("statistics", "expert+projection")
    assert "squared gradients of 64 training batches after the last step take the place of its moments" in caplog.text
    assert plan.layers["model.layers.0.mlp"].order == callback.plan.layers["model.layers.0.mlp"].order


def test_a_method_that_needs_statistics_is_refused_before_training_where_none_are_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics_recorder, "AUTOMATIC_BYTES", 1000)
    module = Module()
    with pytest.raises(
        ValueError, match="method 'statistics' needs expert statistics, and none are collected: their file"
    ):
        trainer(tmp_path, monitor(method="statistics")).fit(module, data())
    assert not module.norms
    with pytest.raises(ValueError, match="method 'statistics' needs expert statistics: give statistics_steps=32"):
        PrecisionAnneal(method="statistics", group_size=32)


def test_costs_of_many_weights_are_not_measured_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_of_run, "UNASKED_WEIGHTS", 1000)
    callback = RouterNormMonitor(group_size=64)
    trainer(tmp_path, callback, max_epochs=1, max_steps=-1).fit(OfAModel(), DataLoader(rows(), batch_size=3))
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert plan.method == "router_norm"
    assert plan.notes["auto"].startswith("measuring what each width costs takes long for 0.0 billion expert weights")
    assert (tmp_path / NAME).exists()
    asked = RouterNormMonitor(group_size=64, method="curvature", export_to="asked.json")
    trainer(tmp_path, asked, max_epochs=1, max_steps=-1).fit(OfAModel(), DataLoader(rows(), batch_size=3))
    assert PrecisionPlan.load(tmp_path / "asked.json").method == "curvature"


def test_a_plan_is_made_where_calibration_fails(monkeypatch):
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    history.record(1, router_norms(layers) + 1)
    settings = PlanSettings(method="weight_error", average_bits=2.5, bits=(2, 3), group_size=64)
    calls, told = [], []
    monkeypatch.setattr(plan_of_run, "rank_zero_info", told.append)

    def step():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return model(input_ids=torch.arange(3, 15).reshape(1, 12))

    plan = plan_of_run.plan_of_run(settings, model, history, None, None, [step])
    assert "calibration_tokens" not in plan.notes
    assert told == ["costs are not calibrated: out of memory"]
    plan_of_run.plan_of_run(settings, model, history, None, None, iter(()))
    assert told[1:] == ["costs are not calibrated: calibration needs at least one batch with tokens"]
