"""``start="auto"``, the cooldown and another teacher in runs of both Trainers, resumed or not."""

import json
from functools import partial

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import Trainer, TrainingArguments

from moe_precision import PrecisionPlan
from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks import anneal_start
from tests.annealing.test_annealing import Language, anneal, fit
from tests.annealing.test_annealing_trainer import ITEMS, train
from tests.annealing.test_annealing_trainer import anneal as trainer_anneal
from tests.annealing.test_teacher import SAME, finished, recovering, saved, stopped  # noqa: F401
from tests.support.models import build
from tests.support.trainers import MemoryLogger

pytestmark = pytest.mark.slow


def watched(optimizer):
    """The rates that an optimizer has at the end of its steps, before they are taken back."""
    seen = []
    optimizer.register_step_post_hook(lambda of, *_: seen.append(of.param_groups[0]["lr"]))
    return seen


class Cooled(Language):
    """At a constant rate, but for a schedule that falls once."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        self.rates = watched(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 6 else 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def measured(*_):
    raise AssertionError("what was found before is not found again")


def test_lightning_begins_where_the_first_run_would_have(tmp_path, monkeypatch, caplog):
    """A share of 0.5 of eight steps, from one batch of 48 tokens."""
    monkeypatch.setattr(anneal_start, "annealed_share", lambda size: 0.5 if 0 < size < 1 else 0)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path / "a", anneal(start="auto"), saver, enable_checkpointing=True, **SAME)
    note = PrecisionPlan.load(tmp_path / "a" / "annealed_plan.json").notes["annealing"]
    size = 8 * 48 / (2 * 8 * 3 * 64 * 128 * (2 + 18 / 64) / 8)
    assert note == {"start": 4, "steps": 4, "share": 0.5, "tokens_per_byte": pytest.approx(size, rel=1e-3)}
    monkeypatch.setattr(anneal_start, "annealed_share", measured)
    for step in (2, 6):  # before and after annealing begins
        resumed = anneal(start="auto")
        module = fit(tmp_path / str(step), resumed, ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"), **SAME)
        assert resumed.plan.notes["annealing"] == note
        for (name, a), (_, b) in zip(whole.state_dict().items(), module.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_transformers_trainer_does_too(tmp_path, monkeypatch):
    monkeypatch.setattr(anneal_start, "annealed_share", lambda size: 0.5 if 0 < size < 1 else 0)
    train(tmp_path, first := trainer_anneal(start="auto"), save_strategy="steps", save_steps=2)
    assert first.plan.notes["annealing"]["start"] == 4
    size = 8 * 2 * 12 / (2 * 8 * 3 * 64 * 128 * (2 + 18 / 64) / 8)
    assert first.plan.notes["annealing"]["tokens_per_byte"] == pytest.approx(size, rel=1e-3)
    assert json.loads((tmp_path / "checkpoint-2" / "annealing_start.json").read_text())["share"] == 0.5
    monkeypatch.setattr(anneal_start, "annealed_share", measured)
    resumed = trainer_anneal(start="auto")
    train(tmp_path, resumed, resume=str(tmp_path / "checkpoint-2"))
    assert resumed.plan.notes["annealing"] == first.plan.notes["annealing"]


def test_statistics_are_of_the_steps_before_the_start_that_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(anneal_start, "annealed_share", lambda size: 0.5)
    callback = anneal(start="auto", statistics_steps=2, method="statistics")
    fit(tmp_path, callback, **SAME)
    assert callback.plan.notes["annealing"]["start"] == 4
    assert max(most for _, _, most in callback.plan.notes["statistics"]["tokens"].values()) <= 2 * 48


def test_a_run_of_unknown_length(tmp_path):
    with pytest.raises(AnnealError, match="start='auto' depends on the number of steps"):
        fit(tmp_path, anneal(start="auto"), steps=-1, max_epochs=-1, max_time="00:00:01:00")
    with pytest.raises(AnnealError, match="cooldown=True falls to 0 at the end of the run"):
        fit(tmp_path, anneal(start=2, cooldown=True), steps=-1, max_epochs=-1, max_time="00:00:01:00")


RATES = [3e-3] * 5 + [3e-3 * (1 - (1 / 4) ** 0.5), 1.5e-3 * (1 - (2 / 4) ** 0.5), 1.5e-3 * (1 - (3 / 4) ** 0.5)]


def test_a_cooldown_over_a_schedule_and_resumed(tmp_path):
    """Annealing begins at step 4 of 8; the schedule halves its rate at step 6."""
    logger = MemoryLogger()
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    cooled = partial(anneal, cooldown=True)
    with pytest.warns(UserWarning, match="both lower the rate"):
        whole = fit(tmp_path, cooled(), saver, module=Cooled(), enable_checkpointing=True, logger=logger, **SAME)
    assert whole.rates == pytest.approx(RATES)
    assert whole.optimizers().param_groups[0]["lr"] == 1.5e-3
    factors = [metrics["anneal/rate_factor"] for _, metrics in logger.calls if "anneal/rate_factor" in metrics]
    assert factors == pytest.approx([1 - (1 / 4) ** 0.5, 1 - (3 / 4) ** 0.5])
    module = Cooled()
    fit(tmp_path / "b", cooled(), module=module, ckpt_path=str(tmp_path / "saved" / "step=6.ckpt"), **SAME)
    assert module.rates == pytest.approx(RATES[6:])
    for (name, a), (_, b) in zip(whole.state_dict().items(), module.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_cooldown_under_transformers_trainer(tmp_path):
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = watched(optimizer)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 6 else 0.5)
    callback = trainer_anneal(cooldown=True)
    Trainer(model, arguments, train_dataset=ITEMS, callbacks=[callback], optimizers=(optimizer, schedule)).train()
    assert rates == pytest.approx(RATES)
    assert optimizer.param_groups[0]["lr"] == 1.5e-3


def test_with_a_teacher_auto_is_the_whole_run_and_another_teacher_is_refused(finished, tmp_path):  # noqa: F811
    callback = recovering(finished, start="auto")
    checkpoint = stopped(tmp_path, callback)
    note = callback.plan.notes["annealing"]
    assert (note["start"], note["steps"], note["share"]) == (0, 8, 1.0)
    other = str(saved(tmp_path / "other", build("mixtral")))
    resume = partial(fit, tmp_path / "again", ckpt_path=checkpoint, **SAME)
    with pytest.raises(AnnealError, match=f"teacher='{other}', and .* learned from a teacher of other weights"):
        resume(recovering(finished, teacher=other))
    with pytest.raises(AnnealError, match=r"teacher=None, and .* has learned from a teacher: resume with what it had"):
        resume(recovering(finished, teacher=None))
    resume(recovering(finished, start="auto"))
    without = stopped(tmp_path / "without", recovering(finished, teacher=None))
    with pytest.raises(AnnealError, match="has learned from no teacher"):
        fit(tmp_path / "again", recovering(finished), ckpt_path=without, **SAME)
