"""What annealing refuses, notices or survives: each of these was silent once, or came too late."""

import copy
import errno
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from moe_precision import allocate, find_moe_layers, quantize_model
from moe_precision.annealing.covers import AnnealError
from moe_precision.annealing.hooks import GridHooks
from moe_precision.callbacks import RouterNormMonitor, SavePretrained
from moe_precision.plans.numbers import AllocationError
from moe_precision.quantize import UnsupportedLayoutError
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.curvature import CurvatureError
from tests.annealing.test_annealing import IDS, Language, Validated, anneal, fit
from tests.annealing.test_annealing_trainer import ITEMS
from tests.annealing.test_annealing_trainer import anneal as trainer_anneal
from tests.annealing.test_annealing_trainer import train as train_with_trainer
from tests.support.models import DECODER, PlainMoE, build, logits
from tests.support.trainers import MemoryLogger

pytestmark = pytest.mark.slow


def hooked(model, bits=1):
    """Hooks at one width for all."""
    layers = find_moe_layers(model)
    size = min(64, *(inp for layer in layers for _, inp in layer.projections.values()))
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=bits, group_size=size)
    return GridHooks(layers, Grid.fit(layers, plan))


@pytest.mark.thorough
def test_a_model_compiled_before_is_compiled_anew():
    model = build("mixtral", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(input_ids=IDS[:2]).logits
        hooks = hooked(model)
        expected = model(input_ids=IDS[:2]).logits
        during = compiled(input_ids=IDS[:2]).logits
        hooks.close()
        after = compiled(input_ids=IDS[:2]).logits
    assert not torch.allclose(before, expected, atol=1e-4)
    torch.testing.assert_close(during, expected)
    torch.testing.assert_close(after, before)


class Direct(PlainMoE):
    """Multiplies by an expert's weights without calling the expert."""

    def forward(self, x):
        gate = self.router(x).softmax(-1)
        hidden = [torch.relu(x @ expert[0].weight.T + expert[0].bias) for expert in self.experts]
        return sum(
            gate[:, i, None] * expert[2](h) for i, (expert, h) in enumerate(zip(self.experts, hidden, strict=True))
        )


class Checkpointed(PlainMoE):
    """Recomputes parts of an expert in the backward pass, when the quantized weights are not over the float ones."""

    def __init__(self):
        super().__init__()
        for expert in self.experts:
            for linear in (expert[0], expert[2]):
                linear.forward = partial(checkpoint, partial(self.product, linear), use_reentrant=False)

    @staticmethod
    def product(linear, x):
        return torch.nn.functional.linear(x, linear.weight, linear.bias)


@pytest.mark.parametrize("family", [PlainMoE, Direct, Checkpointed])
def test_weights_that_are_read_past_the_grid(family):
    torch.manual_seed(0)
    model = family()
    hooks = hooked(model)
    model(torch.randn(16, 32).requires_grad_()).square().sum().backward()
    if family is PlainMoE:
        hooks.check_used()
    else:
        with pytest.raises(AnnealError, match="has learned through its quantized '0'"):
            hooks.check_used()


def test_a_layer_that_is_left_out_of_the_first_steps():
    model = PlainMoE()
    hooks = hooked(model)
    assert not hooks.check_used(steps=1)  # layerdrop
    with pytest.raises(AnnealError, match="took no part in 20 steps"):
        hooks.check_used(steps=20)
    model(torch.randn(16, 32)).square().sum().backward()
    assert hooks.check_used(steps=2)


def test_a_change_in_place_is_seen_by_autograd():
    model = PlainMoE()
    for expert in model.experts:
        expert[1].forward = lambda x: torch.sigmoid(x).mul_(3)
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(torch.randn(8, 32)).sum().backward()
    for expert in model.experts:  # within the covered module
        expert[0].forward = lambda x, m=expert[0]: torch.sigmoid(torch.nn.functional.linear(x, m.weight)).mul_(3)
    hooked(model)
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(torch.randn(8, 32)).sum().backward()


def test_gradients_of_gradients():
    found = []
    for settled in (False, True):
        torch.manual_seed(0)
        model = PlainMoE()
        hooks = hooked(model, bits=2)
        if settled:  # the same weights without hooks
            hooks.settle()
            hooks.close()
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append(model.experts[0][0].weight.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_forward_passes_before_one_backward_pass(reentrant):
    found = []
    for checkpointing in (False, True):
        model = build("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        hooked(model, bits=2)
        losses = [model(input_ids=rows, labels=rows).loss for rows in (IDS[:2], IDS[2:4])]
        sum(losses).backward()
        found.append([p.grad.clone() for p in model.model.layers.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_another_dtype_in_the_forward_pass():
    model = build("mixtral")
    hooked(model)
    model.bfloat16()
    with pytest.raises(AnnealError, match=r"bfloat16 weights and the optimizer keeps torch\.float32"):
        model(input_ids=IDS[:2])


def test_hooks_of_an_interrupted_run_give_way():
    model = build("mixtral")
    plain = logits(model)
    hooked(model, bits=1)
    hooks = hooked(model, bits=2)
    two = logits(model)
    hooks.close()
    torch.testing.assert_close(logits(model), plain, atol=0, rtol=0)
    hooks = hooked(model, bits=2)
    torch.testing.assert_close(logits(model), two, atol=0, rtol=0)


def test_codes_between_two_values_are_not_guessed():
    model = build("mixtral")
    layers = find_moe_layers(model)
    plan = allocate(copy.deepcopy(model), method="uniform", average_bits=2, group_size=64)
    grid = Grid.fit(layers, plan)
    with pytest.raises(ValueError, match="put SavePretrained after PrecisionAnneal"):
        quantize_model(model, plan, grid=grid)


class Counted(pl.Callback):
    """How many batches were trained on before the run ended or failed."""

    batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1


class InHalf(Language):
    """Its moments hardly decay, as with Lightning's "bf16-true"."""

    def __init__(self):
        super().__init__()
        self.model = self.model.bfloat16()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class WithSGD(Language):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recorder():
    return RouterNormMonitor(group_size=64, statistics_batches=0)


def jetmoe():
    module = Language()
    sizes = {**DECODER, "num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2}
    module.model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **sizes))
    return module


@pytest.mark.parametrize(
    ("module", "callbacks", "error", "message", "batches"),
    [
        (Language, lambda: [anneal(method="norm_only", average_bits=2.5, bits=(2, 3))], AnnealError, "records", 0),
        (Language, lambda: [anneal(start=0)], AnnealError, "no second moments to make a plan from", 0),
        (Language, lambda: [SavePretrained(), anneal()], AnnealError, "put it after this one", 0),
        (Language, lambda: [anneal(), RouterNormMonitor(group_size=64)], AnnealError, "put it before this one", 0),
        (Language, lambda: [RouterNormMonitor(distill_steps=2), anneal()], AnnealError, "leave one of the two out", 0),
        (WithSGD, lambda: [anneal()], CurvatureError, "SGD is not among the optimizers", 0),
        (InHalf, lambda: [anneal()], CurvatureError, "torch.bfloat16 hardly decays with beta2=0.999: train in", 0),
        (InHalf, lambda: [anneal(method="auto")], AnnealError, "neither curvature nor what RouterNormMonitor", 0),
        (InHalf, lambda: [recorder(), anneal(method="auto", granularity="layer")], AllocationError, "has only", 0),
        (Language, lambda: [anneal(method="auto", start=0)], AnnealError, "no curvature: with start=0", 0),
        (jetmoe, lambda: [anneal()], UnsupportedLayoutError, "fused, but not through", 0),
    ],
)
def test_what_cannot_work_is_said_at_the_start(module, callbacks, error, message, batches, tmp_path):
    counted = Counted()
    with pytest.raises(error, match=message):
        fit(tmp_path, *callbacks(), counted, module=module())
    assert counted.batches == batches


def test_auto_in_half_precision_takes_the_papers_rule_and_says_so_before_training(tmp_path):
    callback = anneal(method="auto")
    with pytest.warns(UserWarning, match="the plan will be by the paper's rule.*hardly decays"):
        fit(tmp_path, recorder(), callback, precision="bf16-true")
    assert callback.plan.method == "router_norm"


def test_a_checkpoint_of_another_callback_or_plan(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=7, save_top_k=-1, filename="{step}")
    fit(tmp_path, anneal(export_to="a.json"), saver, enable_checkpointing=True)
    saved = str(tmp_path / "saved" / "step=7.ckpt")
    with pytest.raises(AnnealError, match=r"resumes at step 7, annealing began at 5.*export_to='b\.json'"):
        fit(tmp_path, anneal(export_to="b.json"), ckpt_path=saved)
    other = allocate(build("mixtral"), method="uniform", average_bits=3, group_size=64)
    with pytest.raises(AnnealError, match="annealed on a plan other than the given one"):
        fit(tmp_path, anneal(export_to="a.json", plan=other), ckpt_path=saved)


def test_curvature_of_other_weights(tmp_path):
    monitor = RouterNormMonitor(group_size=64, method="curvature", bits=(1, 2, 3), average_bits=2)
    fit(tmp_path / "first", monitor)
    with pytest.raises(ValueError, match="other weights"):
        fit(tmp_path / "second", anneal(start=0, plan=tmp_path / "first" / "precision_plan.json"))


def test_validation_counts_tokens_once_and_passes_over_empty_batches(tmp_path):
    class Empty(Validated):
        def val_dataloader(self):
            rows = [{"input_ids": row, "labels": row} for row in IDS[:2]]
            rows += [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in IDS[2:4]]
            return DataLoader(rows, batch_size=2)

        def validation_step(self, batch, batch_idx):
            self.model(input_ids=batch["input_ids"])

    logger, monitor = MemoryLogger(), RouterNormMonitor(group_size=64, method="router_norm")
    fit(tmp_path, monitor, anneal(), module=Empty(), logger=logger, val_check_interval=5)
    losses = [metrics["anneal/val_loss"] for _, metrics in logger.calls if "anneal/val_loss" in metrics]
    assert losses
    assert all(0 < loss < 20 for loss in losses)
    for load in monitor.history.loads["validation"].values():
        assert load[0].sum() == 4 * 12 * 2  # rows, tokens, experts per token: of validation_step alone


def test_a_full_disk_at_the_end_costs_the_plan_and_not_the_model(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Grid, "save", full)
    with pytest.warns(UserWarning, match="could not write"), pytest.raises(OSError, match=r"callback\.grid\.save"):
        fit(tmp_path, anneal(), SavePretrained())
    assert (tmp_path / "checkpoint" / "config.json").is_file()


def test_training_that_ends_before_annealing_begins(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="ended at step 1, before annealing began at 5"):
        fit(tmp_path, anneal(), Stop(), min_epochs=0)
    assert not (tmp_path / "annealed_plan.json").exists()


def test_runs_that_log_nothing_or_are_for_trying_out(tmp_path):
    fit(tmp_path / "no_log", anneal(), logger=MemoryLogger(), log_every_n_steps=0)
    assert (tmp_path / "no_log" / "annealed_plan.json").is_file()
    fit(tmp_path / "dev", anneal(), fast_dev_run=True)
    assert not (tmp_path / "dev" / "annealed_plan.json").exists()


def test_two_optimizers_log_their_flips(tmp_path):
    class Two(Language):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            experts = [p for n, p in self.named_parameters() if "experts" in n]
            others = [p for n, p in self.named_parameters() if "experts" not in n]
            return torch.optim.AdamW(experts, lr=2e-2), torch.optim.AdamW(others, lr=3e-3)

    logger = MemoryLogger()
    fit(tmp_path, anneal(), module=Two(), logger=logger, steps=20, log_every_n_steps=5)
    flips = {step: metrics["anneal/flips"] for step, metrics in logger.calls if "anneal/flips" in metrics}
    assert flips.keys() == {16, 20}  # the steps that cross 15 and 20
    assert all(share > 0 for share in flips.values())


def test_transformers_trainer_must_end_on_the_last_weights(tmp_path):
    with pytest.raises(AnnealError, match="load_best_model_at_end"):
        train_with_trainer(
            tmp_path,
            trainer_anneal(),
            load_best_model_at_end=True,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=4,
            eval_steps=4,
        )


def test_an_interrupted_trainer_leaves_no_old_grid_behind(tmp_path):
    """transformers does not notify its callbacks of an interruption."""

    class Interrupt(Exception):
        pass

    model, calls = build("mixtral"), []

    def interrupt(*args):
        calls.append(1)
        if len(calls) > 6:
            raise Interrupt

    handle = model.register_forward_pre_hook(interrupt)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    with pytest.raises(Interrupt):
        Trainer(model, arguments, train_dataset=ITEMS, callbacks=[trainer_anneal()]).train()
    handle.remove()
    experts, seen = model.model.layers[0].mlp.experts, []

    def covers():
        return sum(type(getattr(h, "__self__", None)).__name__ == "Cover" for h in experts._forward_pre_hooks.values())

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(covers())

    assert covers() == 1
    Trainer(model, arguments, train_dataset=ITEMS, callbacks=[trainer_anneal(start=0.75), Look()]).train()
    assert seen == [0] * 6 + [1] * 2
    assert covers() == 0
