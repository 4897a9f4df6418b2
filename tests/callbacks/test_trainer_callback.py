"""transformers' Trainer with our callback: the same history and plan as Lightning's for the same weights."""

import pytest
import pytorch_lightning as pl
import torch
import wandb
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moe_precision import AllocationError, HistoryError, PrecisionPlan, RouterNormHistory, find_moe_layers
from moe_precision.callbacks import RouterNormMonitor, RouterNormTrainerCallback
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.gradients import curvature_of_losses
from tests.support.models import build
from tests.support.wandb_file import read_artifacts, read_curves

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(0)).tolist()
ITEM = {"input_ids": IDS, "labels": IDS}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([ITEM] * 40)


def train(folder, callback, steps=6, resume=None, restored=True, evaluation=False, data=None, **changes):
    settings = {"save_strategy": "no", "report_to": [], "logging_steps": 2, **changes}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    # resume_from_checkpoint alone does not restore routers and experts of a Mixtral: transformers issue 48805
    model = AutoModelForCausalLM.from_pretrained(resume) if resume and restored else build("mixtral")
    held_out = [ITEM] * 3 if evaluation else None
    data = [ITEM] * 40 if data is None else data
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=held_out, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)


class Same(pl.LightningModule):
    """The model, data and optimizer of these tests under Lightning."""

    def __init__(self):
        super().__init__()
        self.model = build("mixtral").train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_same_plan_as_lightnings(tmp_path):
    ours = RouterNormTrainerCallback(group_size=64)
    train(tmp_path / "trainer", ours)
    lightnings = RouterNormMonitor(group_size=64)
    pl.Trainer(
        default_root_dir=tmp_path / "lightning",
        accelerator="cpu",
        max_steps=6,
        log_every_n_steps=2,
        callbacks=[lightnings],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Same(), DataLoader([torch.tensor(IDS)] * 40, batch_size=2))
    assert ours.history.steps == lightnings.history.steps == [0, 2, 4, 6]
    assert ours.history.layers == lightnings.history.layers
    for name, norms in ours.history.norms.items():
        torch.testing.assert_close(norms, lightnings.history.norms[name], atol=1e-6, rtol=1e-6)
        assert ours.history.change(name).abs().max() > 1e-4
    assert ours.plan.diff(lightnings.plan) == []
    assert PrecisionPlan.load(tmp_path / "trainer" / "precision_plan.json") == ours.plan
    saved = RouterNormHistory.load(tmp_path / "trainer" / "precision_plan.history.safetensors")
    assert saved.steps == [0, 2, 4, 6]
    assert ours.plan.settings == lightnings.plan.settings


@pytest.mark.slow
def test_resume_keeps_the_baseline(tmp_path):
    whole = RouterNormTrainerCallback(group_size=64, method="router_norm", every_n_steps=1)
    train(tmp_path / "whole", whole)
    train(
        tmp_path / "part",
        RouterNormTrainerCallback(group_size=64, method="router_norm", every_n_steps=1),
        3,
        save_strategy="steps",
        save_steps=3,
    )
    resumed = RouterNormTrainerCallback(group_size=64, method="router_norm", every_n_steps=1)
    train(tmp_path / "part", resumed, resume=str(tmp_path / "part" / "checkpoint-3"))
    assert resumed.history.steps == whole.history.steps == list(range(7))
    for name, norms in whole.history.norms.items():
        assert torch.equal(resumed.history.norms[name], norms)
    assert resumed.plan == whole.plan


def test_routers_that_a_resume_did_not_restore_are_an_error(tmp_path):
    train(
        tmp_path, RouterNormTrainerCallback(group_size=64, method="router_norm"), 3, save_strategy="steps", save_steps=3
    )
    with pytest.raises(
        HistoryError, match=r"not those whose norms were recorded at step 3 .*from_pretrained\(checkpoint\)"
    ):
        train(
            tmp_path,
            RouterNormTrainerCallback(group_size=64, method="router_norm"),
            resume=str(tmp_path / "checkpoint-3"),
            restored=False,
        )


def test_resume_without_our_state_is_said(tmp_path):
    callback = RouterNormTrainerCallback(group_size=64, method="router_norm")
    train(tmp_path, callback, 3, save_strategy="steps", save_steps=3)
    (tmp_path / "checkpoint-3" / "router_norms.safetensors").unlink()
    later = RouterNormTrainerCallback(group_size=64, method="router_norm")
    with pytest.warns(UserWarning, match="resumes at step 3 from a checkpoint without router norms"):
        train(tmp_path, later, resume=str(tmp_path / "checkpoint-3"))
    assert later.plan.baseline_step == 3


def test_accumulation_counts_optimizer_steps(tmp_path):
    callback = RouterNormTrainerCallback(group_size=64, method="router_norm")
    train(tmp_path, callback, 3, gradient_accumulation_steps=4)
    assert callback.history.steps == [0, 2, 3]
    for load in callback.history.loads["training"].values():
        assert load[0].sum() == 3 * 4 * 2 * 12 * 2  # steps, micro-batches, rows, tokens, experts per token


def test_gradients_of_more_batches_after_an_evaluation(tmp_path):
    callback = RouterNormTrainerCallback(group_size=64, method="curvature", curvature_batches=2)
    train(tmp_path, callback, 4, evaluation=True, eval_strategy="steps", eval_steps=2)
    assert callback.plan.method == "curvature"
    assert PrecisionPlan.load(tmp_path / "precision_plan.json") == callback.plan
    curvature = Curvature.load(tmp_path / "precision_plan.curvature.safetensors")
    model = callback._model
    batch = {key: torch.tensor([value, value]) for key, value in ITEM.items()}
    expected = curvature_of_losses(find_moe_layers(model), [lambda: model(**batch).loss] * 2)
    for name in expected.layers:
        torch.testing.assert_close(curvature.rows[name], expected.rows[name], rtol=1e-4, atol=0)
    assert {load[0].sum().item() for load in callback.history.loads["validation"].values()} == {3 * 12 * 2}  # the last


def test_more_batches_of_a_stream(tmp_path):
    """A stream's loader has no length: asking whether it is empty would be an error."""
    callback = RouterNormTrainerCallback(group_size=64, method="curvature", curvature_batches=2, statistics_batches=3)
    train(tmp_path, callback, 2, data=Stream())
    assert callback.plan.method == "curvature"
    assert {int(tokens.sum()) for tokens in callback.statistics.tokens.values()} == {3 * 2 * 12 * 2}


def test_the_best_checkpoint_loaded_at_the_end(tmp_path):
    """The plan is that of the weights that the Trainer ends with."""
    callback = RouterNormTrainerCallback(group_size=64, every_n_steps=1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=30.0,  # so that the first checkpoint is the best
        optim="sgd",
        max_grad_norm=0,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer = Trainer(
        build("gpt_oss"), arguments, train_dataset=[ITEM] * 40, eval_dataset=[ITEM] * 2, callbacks=[callback]
    )
    trainer.state.best_metric = None
    original = trainer._load_best_model

    def load_first(*args, **kwargs):  # whichever is the best, the first one is loaded
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
        original(*args, **kwargs)

    trainer._load_best_model = load_first
    with pytest.warns(UserWarning, match="best checkpoint loaded at the end"):
        trainer.train()
    assert callback.history.steps == [0, 1, 2, 3, 4]
    final = torch.cat([layer.router_weight().detach().norm(dim=1) for layer in find_moe_layers(trainer.model)])
    torch.testing.assert_close(torch.cat(list(callback.history.last.values())), final)


def test_an_interval_as_a_share_of_all_steps(tmp_path):
    callback = RouterNormTrainerCallback(group_size=64, method="router_norm")
    train(tmp_path, callback, 6, logging_steps=0.34)  # every third
    assert callback.history.steps == [0, 3, 6]


@pytest.mark.slow
def test_records_go_to_a_function(tmp_path):
    calls = []
    callback = RouterNormTrainerCallback(group_size=64, method="router_norm").log_to(
        lambda metrics, step: calls.append((step, metrics))
    )
    train(tmp_path, callback)
    assert [step for step, _ in calls] == callback.history.steps == [0, 2, 4, 6]
    norms = [metrics["router_norm/layer_00/expert_003"] for _, metrics in calls]
    assert norms == callback.history.norms["model.layers.0.mlp"][:, 3].tolist()
    assert "expert_load/layer_00/max" in calls[-1][1]


def test_curves_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    callback = RouterNormTrainerCallback(group_size=64)
    train(tmp_path / "run", callback, report_to=["wandb"])
    wandb.finish()
    wandb.teardown()
    (file,) = tmp_path.rglob("*.wandb")
    curves = read_curves(file, x="train/global_step")
    assert [step for step, _ in curves["router_norm/layer_01/expert_007"]] == [0, 2, 4, 6]
    assert [value for _, value in curves["router_norm/layer_01/expert_007"]] == pytest.approx(
        callback.history.norms["model.layers.1.mlp"][:, 7].tolist()
    )
    assert {artifact.name for artifact in read_artifacts(file) if artifact.type == "precision-plan"}


def test_bad_arguments():
    with pytest.raises(AllocationError, match="outside the levels"):
        RouterNormTrainerCallback(average_bits=5, bits=(2, 3))
