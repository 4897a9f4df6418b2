"""Expert loads by the state of the trainer: the mode of the modules says nothing about it."""

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_precision import AllocationError
from moe_precision.callbacks import RouterNormTrainerCallback
from tests.support.models import PlainMoE, build
from tests.support.trainers import Language, Module, data, monitor, trainer

IDS = torch.randint(3, 128, (12, 8), generator=torch.Generator().manual_seed(0))


class Evaluated(Language):
    """A model as `from_pretrained` gives it, in evaluation mode, which Lightning leaves it in."""

    def __init__(self):
        super().__init__(build("mixtral").eval())


class Rollouts(Evaluated):
    """Generates four tokens for every row inside of a training step, as reinforcement learning does."""

    def training_step(self, batch, batch_idx):
        self.model.eval()
        with torch.no_grad():
            self.model.generate(batch, min_new_tokens=4, max_new_tokens=4, do_sample=False)
        self.model.train()
        return self.loss(batch)


class Validated(Evaluated):
    """Puts the model into training mode for its validation: dropout as a measure of doubt."""

    def validation_step(self, batch, batch_idx):
        self.model.train()
        self.loss(batch)


def totals(history, kind):
    return {int(load[0].sum()) for load in history.loads.get(kind, {}).values()}


def loader(rows=12):
    return DataLoader(IDS[:rows], batch_size=2)


@pytest.mark.slow
def test_a_model_in_evaluation_mode_is_trained(tmp_path):
    callback = monitor(group_size=64, method="load")
    module = Evaluated()
    trainer(tmp_path, callback).fit(module, loader())
    assert not module.model.training
    assert totals(callback.history, "training") == {12 * 8 * 2}  # rows, tokens, experts per token
    assert totals(callback.history, "validation") == set()
    tokens = callback.history.loads["training"]["model.layers.0.mlp"][0]
    assert callback.plan.layers["model.layers.0.mlp"].signals["expert_load"] == tokens.tolist()


@pytest.mark.slow
def test_rollouts_are_training(tmp_path):
    callback = monitor(group_size=64)
    trainer(tmp_path, callback).fit(Rollouts(), loader())
    prompt_and_new = 8 + 3  # the last new token is not run
    assert totals(callback.history, "training") == {12 * (8 + prompt_and_new) * 2}
    assert totals(callback.history, "validation") == set()


class SamplesAfterwards(Callback):
    """Runs the model when a validation has ended, to show what it has learned."""

    def on_validation_end(self, trainer, pl_module):
        pl_module.loss(IDS[:5])


@pytest.mark.slow
def test_a_validation_in_training_mode(tmp_path):
    callback = monitor(group_size=64)
    trainer(tmp_path, callback, SamplesAfterwards(), val_check_interval=2).fit(Validated(), loader(), loader(4))
    assert totals(callback.history, "training") == {12 * 8 * 2}
    assert totals(callback.history, "validation") == {4 * 8 * 2}


class Samples(TrainerCallback):
    """Runs the model before the first step, to show what it knows."""

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model(input_ids=IDS[:5])


def train(folder, *callbacks, trainer_class=Trainer, **changes):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        **changes,
    )
    made = trainer_class(
        build("mixtral"), arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks)
    )
    made.train()


@pytest.mark.slow
def test_the_same_under_transformers_trainer(tmp_path):
    class RollsOut(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.eval()
            with torch.no_grad():
                model.generate(inputs["input_ids"], min_new_tokens=4, max_new_tokens=4, do_sample=False)
            return super().training_step(model, inputs, num_items_in_batch)

    plain, rolls_out = (RouterNormTrainerCallback(group_size=64, method="router_norm") for _ in range(2))
    settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    train(tmp_path, plain, Samples(), **settings)
    train(tmp_path, rolls_out, trainer_class=RollsOut, **settings)
    assert totals(plain.history, "training") == {12 * 8 * 2}
    assert totals(rolls_out.history, "training") == {12 * (8 + 8 + 3) * 2}
    for callback in (plain, rolls_out):
        assert totals(callback.history, "validation") == {4 * 8 * 2}


class Unseen(PlainMoE):
    """Experts in one module that is called with the tokens alone."""

    def __init__(self):
        super().__init__()
        inner = nn.Module.__new__(_Experts)
        nn.Module.__init__(inner)
        for index, expert in enumerate(self.experts):
            inner.add_module(str(index), expert)
        self.experts = inner

    def forward(self, x):
        return self.experts(x)


class _Experts(nn.Module):
    def forward(self, x):
        return sum(expert(x) for expert in self.children())


@pytest.mark.slow
def test_loads_that_cannot_be_seen_are_said_after_the_first_step(tmp_path):
    module = Module(nn.Sequential(Unseen(), Unseen()))
    with pytest.raises(AllocationError, match=r"method 'load' needs the tokens.*'model\.0'"):
        trainer(tmp_path, monitor(method="load")).fit(module, data(6))
    assert module.norms == {}  # which the module takes after each step
    other = monitor(group_size=32)
    trainer(tmp_path, other).fit(module, data(6))
    assert other.plan is not None
