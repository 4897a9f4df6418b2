"""transformers' Trainer: where checkpoints are, and what it restarts without telling its callbacks."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import wandb
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks import PrecisionAnnealTrainerCallback, RouterNormTrainerCallback
from tests.support.models import build

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 128, (8, 8), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def trainer(folder, *callbacks, steps=4, trainer_class=Trainer, **changes):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            **changes,
        },
    )
    return trainer_class(
        model_init=lambda: build("gpt_oss"),
        args=arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        callbacks=list(callbacks),
    )


def recorder(**changes):
    return RouterNormTrainerCallback(group_size=64, method="router_norm", statistics_batches=0, **changes)


RATES = (1e-3, 5e-2)


def check_trials(folder, names, plans):
    assert plans[0] != plans[1]
    for name, plan in zip(names, plans, strict=True):
        assert PrecisionPlan.load(folder / name / "precision_plan.json") == plan
        assert RouterNormHistory.load(folder / name / "checkpoint-2" / "router_norms.safetensors").steps == [0, 1, 2]
    assert not list(folder.glob("*.json"))


def test_every_trial_of_a_search_has_its_own_plan(tmp_path, monkeypatch):
    """Two trials as hyperparameter_search runs them for a wandb sweep, whose server is not needed for that."""
    callback = recorder()
    made = trainer(tmp_path, callback)
    made.hp_search_backend, made.hp_name = HPSearchBackend.WANDB, lambda trial: f"rate-{trial['learning_rate']}"
    monkeypatch.setattr(wandb, "run", SimpleNamespace(id="x", log=print, log_artifact=print, summary={}))
    plans = []
    for rate in RATES:
        made.train(trial={"learning_rate": rate})
        plans.append(callback.plan)
    check_trials(tmp_path, [f"rate-{rate}" for rate in RATES], plans)


def test_a_search_with_optuna(tmp_path):
    optuna = pytest.importorskip("optuna")
    plans = []

    class Keeps(RouterNormTrainerCallback):
        def on_train_end(self, *args, **kwargs):
            super().on_train_end(*args, **kwargs)
            plans.append(self.plan)

    made = trainer(tmp_path, Keeps(group_size=64, statistics_batches=0), eval_strategy="steps", eval_steps=2)
    made.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", RATES)},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": RATES}, seed=0),
    )
    check_trials(tmp_path, ["run-0", "run-1"], plans)


def test_a_resume_in_another_folder_finds_the_norms(tmp_path):
    whole = recorder()
    trainer(tmp_path / "whole", whole).train()
    trainer(tmp_path / "first", recorder(), steps=2).train()
    moved = tmp_path / "elsewhere" / "saved"
    moved.parent.mkdir()
    shutil.move(tmp_path / "first" / "checkpoint-2", moved)
    resumed = recorder()
    trainer(tmp_path / "second", resumed).train(resume_from_checkpoint=str(moved))
    assert resumed.history.steps == whole.history.steps == [0, 1, 2, 3, 4]
    for name, norms in whole.history.norms.items():
        assert torch.equal(resumed.history.norms[name], norms)
    assert resumed.plan == whole.plan
    assert PrecisionPlan.load(tmp_path / "second" / "precision_plan.json") == whole.plan


def test_a_grid_is_found_there_too(tmp_path):
    settings = {"start": 1, "average_bits": 2.0, "group_size": 64}
    trainer(tmp_path / "first", PrecisionAnnealTrainerCallback(**settings), steps=2).train()
    resumed = PrecisionAnnealTrainerCallback(**settings)
    trainer(tmp_path / "second", resumed).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert PrecisionPlan.load(tmp_path / "second" / "annealed_plan.json") == resumed.plan
    (tmp_path / "first" / "checkpoint-2" / "annealing.safetensors").unlink()
    with pytest.raises(AnnealError, match="the checkpoint has no grid"):
        trainer(tmp_path / "third", PrecisionAnnealTrainerCallback(**settings)).train(
            resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2")
        )


class Dies(TrainerCallback):
    """Stands for ``kill -9`` after the last checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            raise KeyboardInterrupt


def test_a_finished_run_that_was_killed_writes_its_files(tmp_path):
    whole = recorder()
    trainer(tmp_path / "whole", whole).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "part", recorder(), Dies()).train()
    assert not (tmp_path / "part" / "precision_plan.json").exists()
    resumed = recorder()
    trainer(tmp_path / "part", resumed).train(resume_from_checkpoint=True)
    assert resumed.plan == whole.plan
    assert PrecisionPlan.load(tmp_path / "part" / "precision_plan.json") == whole.plan


class RunsOut(Trainer):
    """Runs out of memory in its third step with rows of two or more."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 2 and len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    """The Trainer begins again at step 0 with the weights that it has: the baseline stays that of the first attempt."""
    callback = recorder()
    made = trainer(tmp_path, callback, trainer_class=RunsOut, auto_find_batch_size=True, save_strategy="no")
    first = [layer.router.weight.detach().norm(dim=1) for layer in _routers(made.model)]
    with pytest.warns(UserWarning, match=r"auto_find_batch_size has restarted .*recorded up to step 2\)"):
        made.train()
    assert callback.history.steps == [0, 1, 2, 3, 4]
    last = [layer.router.weight.detach().norm(dim=1) for layer in _routers(made.model)]
    for index, name in enumerate(callback.history.layers):
        torch.testing.assert_close(callback.history.first[name], first[index])
        torch.testing.assert_close(callback.history.change(name), last[index] - first[index])


def _routers(model):
    return [layer.mlp for layer in model.model.layers]


def test_a_checkpoint_that_is_somewhere_else(tmp_path):
    """A Trainer that keeps its checkpoints in a place of its own goes on, with a warning."""

    class Elsewhere(Trainer):
        def _save_checkpoint(self, model, trial):
            pass

    callback = recorder()
    with pytest.warns(UserWarning, match=r"checkpoint-2' is not there.*'router_norms.safetensors' is not saved"):
        trainer(tmp_path, callback, trainer_class=Elsewhere).train()
    assert callback.plan is not None
