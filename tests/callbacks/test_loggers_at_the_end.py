"""A logger that fails when training ends costs nothing but its charts, and says so once all else is done."""

import json
from itertools import pairwise

import pytest
import torch
import wandb
from pytorch_lightning.loggers import WandbLogger
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from wandb.sdk.artifacts._validators import validate_artifact_name

from moe_precision import PrecisionPlan, RouterNormHistory, allocate, find_moe_layers
from moe_precision.callbacks import RouterNormTrainerCallback, SavePretrained
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.present.wandb_media import MEDIA, artifact_name, kept_records, log_media
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build
from tests.support.trainers import Language, MemoryLogger, monitor, trainer
from tests.support.wandb_file import read_artifacts, read_curves

IDS = torch.randint(3, 128, (10, 8), generator=torch.Generator().manual_seed(0))


class Broken(MemoryLogger):
    """Takes what is logged during training, and nothing at its end, after five steps."""

    def log_metrics(self, metrics, step=None):
        if step == 5:
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


class Finished(MemoryLogger):
    """A WandbLogger whose run was finished by somebody else after the last step."""

    @property
    def experiment(self):
        if self.calls and self.calls[-1][0] == 5:
            raise wandb.errors.UsageError("run is finished")
        return None


@pytest.mark.slow
def test_other_loggers_and_the_model_get_what_is_theirs(tmp_path):
    wandb_logger = type("WandbLogger", (Finished,), {})()
    loggers = [Broken(), MemoryLogger(), wandb_logger]
    said = r"could not log the last router norms to Broken \(ConnectionError: the server is gone\); the charts to wandb"
    with pytest.warns(UserWarning, match=said) as caught:
        trainer(tmp_path, monitor(group_size=64), SavePretrained(), logger=loggers).fit(
            Language(), DataLoader(IDS, batch_size=2)
        )
    assert [step for step, _ in loggers[1].records()] == [step for step, _ in wandb_logger.records()] == [0, 2, 4, 5]
    PrecisionPlan.load(tmp_path / "precision_plan.json").check(load_model(tmp_path / "checkpoint"))
    (text,) = [str(one.message) for one in caught if "could not log" in str(one.message)]
    assert text.count("run is finished") == len(MEDIA)
    assert repr(str(tmp_path)) in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run_id", ["lr=1e-4", "two words", "x" * 64])
def test_a_run_id_of_any_kind(run_id, tmp_path):
    logger = WandbLogger(project="test", offline=True, save_dir=tmp_path, id=run_id)
    trainer(tmp_path, monitor(group_size=64), SavePretrained(), logger=logger).fit(
        Language(), DataLoader(IDS, batch_size=2)
    )
    wandb.finish()
    wandb.teardown()
    (path,) = tmp_path.rglob("*.wandb")
    assert {a.name for a in read_artifacts(path) if a.type == "precision-plan"} == {artifact_name(run_id)}
    assert (tmp_path / "checkpoint" / "config.json").is_file()


def test_names_of_artifacts():
    """Clean, short, and apart where the run ids are; an id that is clean already stays."""
    ids = ["abc123", "lr=1e-4", "lr 1e-4", "lr/1e-4", "lr-1e-4", "x" * 125, "x" * 124 + "y", "ß" * 200, "Ä", "Ö"]
    names = [artifact_name(one) for one in ids]
    assert names[0] == "precision-plan-abc123"
    assert names[4] == "precision-plan-lr-1e-4"
    assert len(set(names)) == len(ids)
    for name in names:
        assert validate_artifact_name(name) == name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


@pytest.mark.slow
def test_transformers_trainer_reaches_save_model(tmp_path, monkeypatch):
    """Whatever the run does at the end; before that an error of the tracker is the user's to see."""

    class Run:
        id, failing = "lr=1e-4", False

        def log(self, metrics):
            if self.failing:
                raise wandb.errors.UsageError("run is finished")

        log_artifact = log

        @property
        def summary(self):
            raise wandb.errors.UsageError("run is finished")

    class FinishesEarly(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            run.failing = True

    run = Run()
    monkeypatch.setattr("moe_precision.callbacks.router_norm_trainer_callback.current_run", lambda: run)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    callbacks = [FinishesEarly(), RouterNormTrainerCallback(group_size=64, method="router_norm")]
    made = Trainer(build("mixtral"), arguments, train_dataset=rows, callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"could not log the last router norms \(.*the summary to wandb"):
        made.train()
    made.save_model(str(tmp_path / "model"))
    PrecisionPlan.load(tmp_path / "precision_plan.json").check(load_model(tmp_path / "model"))


# -- charts -----------------------------------------------------------------------------------------------------------


def test_records_that_a_chart_shows():
    assert kept_records(3, 8) == [0, 1, 2]
    assert kept_records(500, 20) == list(range(500))
    for records, curves in ((300, 64), (10_000, 8), (1000, 384), (2000, 5000)):
        kept = kept_records(records, curves)
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, records - 1)
        assert len(kept) * curves <= 10_000
        assert max(b - a for a, b in pairwise(kept)) - (records - 1) / (len(kept) - 1) < 1
    assert len(kept_records(300, 64)) == 156  # 10,000 / 64
    assert kept_records(2000, 5001) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_curve_is_in_the_file(tmp_path, monkeypatch):
    """64 experts at 300 steps: W&B keeps 10,000 rows of a table, which were 34 of the curves."""
    model = build("mixtral", num_local_experts=64, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    for step in range(300):
        history.record(step, router_norms(layers) + 0.01 * step)
    plan = allocate(model, method="uniform", average_bits=2, group_size=32)
    plan.save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    for what in MEDIA:
        log_media(what, lambda: run, history, plan, tmp_path / "plan.json")
    wandb.finish()
    wandb.teardown()
    (path,) = tmp_path.rglob("*.wandb")
    assert "router_norm_curves/layer_00_table.path" in read_curves(path)
    (table,) = tmp_path.rglob("*.table.json")
    rows = json.loads(table.read_text())["data"]
    assert len(rows) == 156 * 64
    assert {key for _, key, _ in rows} == {f"expert_{expert:03d}" for expert in range(64)}
    (norms,) = history.norms.values()
    for expert in (0, 63):
        curve = {step: value for step, key, value in rows if key == f"expert_{expert:03d}"}
        assert {0, 299} <= curve.keys()
        for step, value in curve.items():
            assert value == pytest.approx(norms[step, expert].item())
