"""A teacher where a run is not the plain one: buffers, leftovers of an interrupted run, full disks, other losses."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_precision import allocate
from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.soft_labels import divergence_less_cross_entropy
from moe_precision.annealing.teacher import Teacher, saved_tensors
from moe_precision.callbacks import PrecisionAnneal, PrecisionAnnealTrainerCallback
from tests.annealing.test_annealing import IDS, fit
from tests.annealing.test_teacher import WIDTHS, divergence, on_grid
from tests.support.models import build

BATCH = {"input_ids": IDS[:3], "labels": IDS[:3]}
ROWS = [{"input_ids": row, "labels": row} for row in IDS[:8]]


def teacher_of(model, hooks, other, share=1.0):
    return Teacher(model, saved_tensors(other), share, hooks)


class Interrupts(TrainerCallback):
    """Ends a run by an error after its first step."""

    def on_step_end(self, args, state, control, **kwargs):
        raise InterruptedError


def test_a_teacher_routes_by_its_own_biases_which_are_buffers():
    model, hooks, other = on_grid("deepseek_v3")
    biases = {name: one for name, one in other.named_buffers() if name.endswith("e_score_correction_bias")}
    for one in biases.values():
        one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(2)))
    before = {name: one.clone() for name, one in saved_tensors(model).items()}
    assert biases
    assert biases.keys() <= before.keys()
    teacher = teacher_of(model, hooks, other)
    with torch.no_grad(), teacher.in_charge():
        assert torch.equal(model(**BATCH).logits, other(**BATCH).logits)
    assert all(torch.equal(before[name], one) for name, one in saved_tensors(model).items())


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [None, "start"])
def test_what_an_interrupted_run_left_teaches_no_later_one(teacher, tmp_path):
    """transformers' Trainer tells its callbacks nothing of an interruption."""
    model = build("mixtral")
    plan = allocate(model, **WIDTHS)
    weights = {name: one.clone() for name, one in model.state_dict().items()}

    def trained(model, folder, *others, teacher):
        callback = PrecisionAnnealTrainerCallback(start=0, plan=plan, teacher=teacher)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=2, learning_rate=3e-3, use_cpu=True, report_to=[], disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback, *others]).train()
        return model.state_dict()

    with pytest.raises(InterruptedError):
        trained(model, "interrupted", Interrupts(), teacher="start")
    model.load_state_dict(weights)
    after, alone = (trained(one, "again", teacher=teacher) for one in (model, build("mixtral")))
    assert all(torch.equal(one, after[name]) for name, one in alone.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_divergence_is_computed_in_float32_in_mixed_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (10 * torch.randn(16, 500, generator=generator) for _ in range(2))
    logits[0, 0] = 1e5  # more than float16 holds
    labels = torch.arange(16)
    expected = divergence_less_cross_entropy(logits, teacher, labels)
    with torch.autocast("cpu", dtype):
        assert torch.equal(divergence_less_cross_entropy(logits, teacher, labels), expected)


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_teacher_does_not_fail_the_run(tmp_path):
    (tmp_path / "annealed_plan.teacher.safetensors").mkdir()
    callback = PrecisionAnneal(start=0, plan=allocate(build("mixtral"), **WIDTHS), teacher="start")
    with pytest.warns(UserWarning, match="This run has its teacher all the same"):
        fit(tmp_path, callback, steps=1)
    assert (tmp_path / "annealed_plan.json").is_file()


@pytest.mark.slow
def test_a_checkpoint_saved_in_the_middle_of_the_teachers_pass_is_the_models():
    """Lightning saves one in the handler of SLURM's signal, whatever runs at that moment."""
    model, hooks, other = on_grid("mixtral", tie_word_embeddings=True)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    teacher = teacher_of(model, hooks, other)
    saved = {}
    handle = model.model.norm.register_forward_hook(lambda *_: saved.update(model.state_dict()) if not saved else None)
    model(**BATCH)
    handle.remove()
    assert saved.keys() == before.keys()
    assert "lm_head.weight" in saved
    assert all(torch.equal(one, saved[name]) for name, one in before.items())
    teacher.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_a_share_of_the_loss_is_that_of_what_the_model_makes_of_its_arguments(family):
    """Encoder-decoder models take ``num_items_in_batch`` and ignore it; others take labels that are shifted already."""
    model, hooks, other = on_grid(family)
    model.eval()
    batch = BATCH | {"num_items_in_batch": torch.tensor(100)}
    if family == "mixtral":
        batch["shift_labels"] = BATCH["labels"].roll(3, 1)
    plain = model(**batch)
    with torch.no_grad():
        taught = other(**batch).logits
    targets = batch.get("shift_labels", batch["labels"])
    tokens = 100 if family == "mixtral" else targets.numel()
    change = divergence(taught, plain.logits).sum() - F.cross_entropy(plain.logits.mT, targets, reduction="sum")
    teacher_of(model, hooks, other, 0.5)
    torch.testing.assert_close(model(**batch).loss.double(), plain.loss + 0.5 * change / tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_the_labels_mean_cross_entropy_is_refused():
    def smoothed(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], label_smoothing=0.3)

    for changes, batch in (({"loss_function": smoothed}, BATCH), ({}, BATCH | {"ignore_index": int(IDS[0, 4])})):
        model, hooks, other = on_grid()
        for name, value in changes.items():
            setattr(model, name, value)
        teacher_of(model, hooks, other)
        with pytest.raises(AnnealError, match="is not the mean cross-entropy of its labels"):
            model(**batch)
