"""A teacher for annealed steps: the loss it makes, whose weights are used when, and what is refused."""

import json
import shutil
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from moe_precision import allocate, collect_statistics, find_moe_layers
from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.hooks import GridHooks
from moe_precision.annealing.soft_labels import divergence_less_cross_entropy
from moe_precision.annealing.teacher import Teacher, saved_tensors
from moe_precision.annealing.teacher_weights import teacher_weights
from moe_precision.callbacks import PrecisionAnneal, PrecisionAnnealTrainerCallback
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.quantize.codec.grid import Grid
from tests.annealing.test_annealing import IDS, Language, fit
from tests.support.models import build
from tests.support.trainers import MemoryLogger

WIDTHS = {"method": "random", "bits": (1, 2, 3), "average_bits": 2, "group_size": 32}


def divergence(teacher, model):
    """KL(teacher || model) in nats per row, by its definition."""
    p, q = teacher.double().softmax(-1), model.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def on_grid(family="mixtral", seed=1, **changes):
    """A model on its grid, and another one's weights."""
    model = build(family, **changes).train()
    layers = find_moe_layers(model)
    hooks = GridHooks(layers, Grid.fit(layers, allocate(model, **WIDTHS)))
    other = build(family, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model, hooks, other


def test_kl_less_cross_entropy_is_that_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(5, 7, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 6, -100, 3, 3])
    expected = divergence(teacher, logits) - F.cross_entropy(logits.double(), labels, reduction="none")
    expected[2] = 0
    found = divergence_less_cross_entropy(logits, teacher, labels)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_row_that_does_not_count_may_hold_anything():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [float("inf"), float("nan")]])
    found = divergence_less_cross_entropy(logits, teacher, torch.tensor([1, -100])).sum()
    found.backward()
    assert found.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_and_its_gradient_are_those_of_kl_in_the_place_of_labels(family, share):
    model, hooks, other = on_grid(family)
    batch = {"input_ids": IDS[:3], "labels": IDS[:3].clone()}
    batch["labels"][0, 4:7] = -100
    model.eval()  # as from_pretrained gives it, and Lightning trains it; a router's jitter would differ between passes
    plain = model(**batch)
    other.eval()
    taught = other(**batch).logits.detach()
    shift = 0 if model.config.is_encoder_decoder else 1
    targets = batch["labels"][:, shift:]
    student, taught = (x[:, : x.shape[1] - shift][targets != -100] for x in (plain.logits, taught))
    cross_entropy = F.cross_entropy(student, targets[targets != -100])
    expected = plain.loss + share * (divergence(taught, student).mean() - cross_entropy)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    teacher = Teacher(model, saved_tensors(other), share, hooks)
    loss = model(**batch).loss
    loss.backward()
    teacher.check_used()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_of_the_teacher_is_left_after_its_pass(autocast):
    model, hooks, other = on_grid()
    batch = {"input_ids": IDS[:3], "labels": IDS[:3]}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = model(**batch).logits
        teacher = Teacher(model, saved_tensors(other), 1.0, hooks)
        first = model(**batch)
        taught = model(**batch)  # before any backward pass of the first
    assert torch.equal(alone, taught.logits)
    taught.loss.backward()
    first.loss.backward()
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with torch.no_grad():
        expected = other(**batch).logits
        with teacher.in_charge():
            assert torch.equal(model(**batch).logits, expected)
    assert model.training


def test_an_interruption_in_the_teachers_pass_leaves_the_models_weights():
    model, hooks, other = on_grid()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def stop(*_):
        raise KeyboardInterrupt

    teacher = Teacher(model, saved_tensors(other), 1.0, hooks)
    handle = model.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS[:3], labels=IDS[:3])
    handle.remove()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    teacher.close()
    assert model(input_ids=IDS[:3], labels=IDS[:3]).loss.isfinite()


def test_without_labels_or_gradients_the_model_is_left_alone():
    model, hooks, other = on_grid()
    teacher = Teacher(model, saved_tensors(other), 1.0, hooks)
    with torch.no_grad():
        plain = model(input_ids=IDS[:3], labels=IDS[:3]).loss
    model(input_ids=IDS[:3]).logits.sum().backward()
    teacher.close()
    assert torch.equal(plain, model(input_ids=IDS[:3], labels=IDS[:3]).loss)
    with pytest.raises(AnnealError, match="no gradient has come from the teacher"):
        teacher.check_used()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkpoint whose predictions are far from even, and a plan of it."""
    folder = tmp_path_factory.mktemp("finished")
    model = build("mixtral")
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder / "checkpoint")
    allocate(model, **WIDTHS).save(folder / "precision_plan.json")
    return folder


def recovering(finished, **changes):
    settings = {"start": 0, "plan": str(finished / "precision_plan.json"), "teacher": str(finished / "checkpoint")}
    return PrecisionAnneal(**(settings | changes))


class Checked(Language):
    """With validation on batches of a transformers model."""

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader([{"input_ids": row, "labels": row} for row in IDS[:4]], batch_size=4)


@pytest.mark.slow
def test_a_model_comes_nearer_to_its_teacher_alone(finished, tmp_path):
    teacher = load_model(finished / "checkpoint")
    logger, module = MemoryLogger(), Checked()
    with torch.no_grad():
        expected = teacher(input_ids=IDS[:4]).logits[:, :-1]
    fit(tmp_path, recovering(finished), module=module, logger=logger, log_every_n_steps=1, steps=20)
    kl = [metrics["anneal/kl"] for _, metrics in logger.calls if "anneal/kl" in metrics]
    assert len(kl) == 20
    assert kl[-1] < 0.85 * kl[0]
    validation = next(metrics for _, metrics in reversed(logger.calls) if "anneal/val_kl" in metrics)
    with torch.no_grad():  # its weights are on the grid now
        found = module.model.eval()(input_ids=IDS[:4]).logits[:, :-1]
    assert validation["anneal/val_kl"] == pytest.approx(float(divergence(expected, found).mean()), rel=1e-3)
    assert (tmp_path / "annealed_plan.json").is_file()


class StopAt(pl.Callback):
    """Ends a run by an error after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise InterruptedError


SAME = {"data": IDS[:4].repeat(10, 1), "steps": 8}  # a DataLoader starts over when a run is resumed


def stopped(folder, callback):
    """A run that ends in step 5; the checkpoint of step 4."""
    saver = ModelCheckpoint(folder / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    with pytest.raises(InterruptedError):
        fit(folder, callback, saver, StopAt(5), enable_checkpointing=True, **SAME)
    return str(folder / "saved" / "step=4.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [None, "start"])
def test_a_resumed_run_ends_bit_identical(teacher, finished, tmp_path):
    taught = partial(recovering, finished, teacher_weight=0.5, teacher=teacher or str(finished / "checkpoint"))
    whole = fit(tmp_path / "whole", taught(), **SAME)
    checkpoint = stopped(tmp_path / "rest", taught())
    assert (tmp_path / "rest" / "annealed_plan.teacher.safetensors").is_file() == (teacher == "start")
    resumed = fit(tmp_path / "rest", taught(), ckpt_path=checkpoint, **SAME)
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not list(tmp_path.rglob("*.teacher.safetensors"))  # they are for resumed runs alone


@pytest.mark.slow
def test_a_resumed_run_without_its_own_teacher_is_an_error(finished, tmp_path):
    checkpoint = stopped(tmp_path, recovering(finished, teacher="start"))
    file = tmp_path / "annealed_plan.teacher.safetensors"
    other = tmp_path / "other"
    module = Language()
    with torch.no_grad():
        for layer in find_moe_layers(module.model):
            for bank in layer.banks.values():
                bank.weights[0].parameter().mul_(1.5)
    with pytest.raises(InterruptedError):
        fit(other, recovering(finished, teacher="start"), StopAt(2), module=module)
    shutil.copy(other / file.name, file)
    resume = partial(fit, tmp_path, recovering(finished, teacher="start"), ckpt_path=checkpoint, **SAME)
    with pytest.raises(AnnealError, match="is the teacher of another run than the checkpoint"):
        resume()
    file.unlink()
    with pytest.raises(AnnealError, match=r"training resumes with teacher='start', and .* is gone"):
        resume()


@pytest.mark.slow
def test_the_model_at_the_start_is_the_teacher_before_codes_move_its_weights(finished, tmp_path):
    """Rounding under statistics moves the weights onto codes when annealing begins."""
    module = Language()
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            with anneal._taught.teacher.in_charge():
                seen.update({name: one.detach().clone() for name, one in module.model.named_parameters()})

    model = Language().model
    collect_statistics(model, [{"input_ids": IDS}]).save(finished / "precision_plan.statistics.safetensors")
    anneal = recovering(finished, teacher="start", statistics_steps=1)
    fit(tmp_path, anneal, Look(), module=module, steps=2)
    assert seen.keys() == before.keys()
    assert all(torch.equal(seen[name], weight) for name, weight in before.items())
    (finished / "precision_plan.statistics.safetensors").unlink()


@pytest.mark.slow
def test_transformers_trainer_accumulates_the_same_loss(finished, tmp_path):
    """Two micro-batches of two rows, of different lengths, make the step of one batch of four."""
    rows = [
        {"input_ids": row[:length].tolist(), "labels": row[:length].tolist()}
        for row, length in zip(IDS[:8], LENGTHS, strict=True)
    ]

    def trained(folder, size):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        arguments = TrainingArguments(
            str(folder), max_steps=2, learning_rate=3e-3, use_cpu=True, report_to=[], disable_tqdm=True, **settings
        )
        common = {"start": 0, "plan": str(finished / "precision_plan.json"), "teacher": str(finished / "checkpoint")}
        callback = PrecisionAnnealTrainerCallback(**common, teacher_weight=0.75)
        model = build("mixtral", router_aux_loss_coef=0.0)
        Trainer(model, arguments, train_dataset=rows, data_collator=padded, callbacks=[callback]).train()
        return model.state_dict()

    whole, parts = trained(tmp_path / "whole", 4), trained(tmp_path / "parts", 2)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], atol=2e-4, rtol=1e-3, msg=name)


LENGTHS = [12, 5, 9, 3, 12, 4, 8, 7]


def padded(rows):
    """Rows of one length, in which what was added has no label."""
    width = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows]) for key, fill in filled.items()
    }
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return batch | {"attention_mask": torch.tensor(mask)}


class OwnLoss(Language):
    """Computes its loss from the logits."""

    def training_step(self, batch, batch_idx):
        logits = self.model(input_ids=batch).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class NoLoss(Language):
    """Asks for a tuple in the place of an output with names."""

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "message"),
    [(OwnLoss, "no gradient has come from the teacher"), (NoLoss, "returns tuple without logits")],
)
def test_a_training_step_that_cannot_be_taught(module, message, finished, tmp_path):
    with pytest.raises(AnnealError, match=message):
        fit(tmp_path, recovering(finished), module=module())


def saved(folder, model, **config):
    """A checkpoint, with other values in its config.json."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.slow
def test_a_teacher_that_is_not_of_this_model_is_refused(finished, tmp_path):
    model = build("mixtral")
    wrong = {
        "a vocabulary of 130 tokens, the model that is trained 128": build("mixtral", vocab_size=130),
        "is a Qwen3MoeForCausalLM, the model that is trained a MixtralForCausalLM": build("qwen3_moe"),
        r"says num_experts_per_tok=1, that of the model 2": build("mixtral", num_experts_per_tok=1),
        r"'model.layers.\d+..* is None there, \(.*\) here": build("mixtral", num_hidden_layers=1),
    }
    for number, (message, other) in enumerate(wrong.items()):
        with pytest.raises(AnnealError, match=message):
            teacher_weights(saved(tmp_path / str(number), other), model)
    with pytest.raises(AnnealError, match="is quantized: give the float checkpoint"):
        teacher_weights(
            saved(tmp_path / "packed", model, quantization_config={"quant_method": "gptq", "bits": 4}), model
        )
    with pytest.raises(
        AnnealError, match="a teacher needs a transformers model, which returns loss and logits; got Linear"
    ):
        teacher_weights(finished / "checkpoint", torch.nn.Linear(2, 2))
    for weight in (0, 1.5):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, got {weight}"):
            PrecisionAnneal(teacher=str(finished / "checkpoint"), teacher_weight=weight)


@pytest.mark.slow
def test_weights_that_a_teacher_lacks_or_that_are_not_finite(finished, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(finished / "checkpoint", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    broken = tensors | {"lm_head.weight": torch.full_like(tensors["lm_head.weight"], torch.nan)}
    save_file(broken, file, {"format": "pt"})
    with pytest.raises(AnnealError, match="the teacher's logits are not finite"):
        fit(tmp_path, recovering(finished, teacher=str(folder)))
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AnnealError, match=r"lacks weights of the model, 'lm_head.weight' the first of 1"):
        fit(tmp_path, recovering(finished, teacher=str(folder)))
