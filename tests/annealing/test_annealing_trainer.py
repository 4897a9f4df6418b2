"""Annealing under transformers' Trainer: the same end as Lightning's, resumed in the middle or not."""

import pytest
import torch
import wandb
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moe_precision import PrecisionPlan, allocate
from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks import PrecisionAnnealTrainerCallback, RouterNormTrainerCallback
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from moe_precision.quantize.codec.grid import Grid, GridError
from tests.support.models import build, logits
from tests.support.wandb_file import read_curves

IDS = torch.randint(3, 128, (40, 12), generator=torch.Generator().manual_seed(0))
ITEMS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]


def anneal(**changes):
    settings = {"start": 0.5, "average_bits": 2.0, "bits": (1, 2, 3), "group_size": 64, **changes}
    return PrecisionAnnealTrainerCallback(**settings)


def train(folder, *callbacks, steps=8, resume=None, restored=True, **changes):
    settings = {"save_strategy": "no", "report_to": [], "logging_steps": 2, **changes}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    # resume_from_checkpoint alone does not restore routers and experts of a Mixtral: transformers issue 48805
    model = AutoModelForCausalLM.from_pretrained(resume) if resume and restored else build("mixtral")
    trainer = Trainer(model, arguments, train_dataset=ITEMS, eval_dataset=ITEMS[:6], callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_the_packed_model_is_the_one_that_training_ended_on(tmp_path, capsys):
    callback = anneal()
    trainer = train(tmp_path, callback, gradient_accumulation_steps=2)
    assert callback.plan.method == "curvature"
    assert callback.plan.average_bits <= 2.0
    trainer.save_model(tmp_path / "checkpoint")
    paths = [str(tmp_path / name) for name in ("checkpoint", "annealed_plan.json", "out")]
    assert main(["quantize", *paths]) == 0
    assert "which training ended on" in capsys.readouterr().out
    annealed = logits(trainer.model.eval())
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), annealed, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_resume_in_the_middle_ends_bit_identical(tmp_path):
    whole = train(tmp_path, anneal(), save_strategy="steps", save_steps=6)
    resumed = train(tmp_path, anneal(), resume=str(tmp_path / "checkpoint-6"))
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert (
        Grid.load(tmp_path / "checkpoint-6" / "annealing.safetensors").plan.diff(
            PrecisionPlan.load(tmp_path / "annealed_plan.json")
        )
        == []
    )


@pytest.mark.slow
def test_a_resume_that_lost_weights_or_grid_is_an_error(tmp_path):
    train(tmp_path, anneal(), steps=6, save_strategy="steps", save_steps=6)
    checkpoint = tmp_path / "checkpoint-6"
    with pytest.raises(GridError, match=r"belongs to other weights.*from_pretrained\(checkpoint\)"):
        train(tmp_path, anneal(), resume=str(checkpoint), restored=False)
    (checkpoint / "annealing.safetensors").unlink()
    with pytest.raises(AnnealError, match="resumes at step 6, annealing began at 4"):
        train(tmp_path, anneal(), resume=str(checkpoint))


@pytest.mark.slow
def test_a_plan_by_router_norms_and_one_for_another_model(tmp_path):
    recorder = RouterNormTrainerCallback(group_size=64)
    callback = anneal(method="router_norm", recorder=recorder)
    train(tmp_path, recorder, callback)
    assert callback.plan.method == "router_norm"
    assert callback.plan.baseline_step == 0
    with pytest.raises(AnnealError, match=r"RouterNormTrainerCallback \(recorder=...\) records"):
        train(tmp_path, anneal(method="router_norm"))
    other = allocate(build("qwen3_moe"), method="uniform", average_bits=2, group_size=64)
    with pytest.raises(ValueError, match="for a model of type 'qwen3_moe'"):
        train(tmp_path, anneal(plan=other))
    with pytest.raises(AnnealError, match="distill_steps=2 would distill scales for the float weights"):
        train(tmp_path, anneal(recorder=RouterNormTrainerCallback(distill_steps=2)))
    with pytest.raises(AnnealError, match="start=8 is step 8 of 8"):
        train(tmp_path, anneal(start=8))


@pytest.mark.slow
def test_what_wandb_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", anneal(), report_to=["wandb"], eval_strategy="steps", eval_steps=8)
    wandb.finish()
    wandb.teardown()
    (file,) = tmp_path.rglob("*.wandb")
    curves = {key: dict(points) for key, points in read_curves(file, x="train/global_step").items()}
    assert curves["anneal/active"] == {2: 0.0, 4: 0.0, 6: 1.0, 8: 1.0}
    assert curves["anneal/flips"].keys() == {6, 8}
    on, off = curves["anneal/val_loss"][8], curves["anneal/val_loss_float"][8]
    assert on != off
    assert abs(on - off) < 1
