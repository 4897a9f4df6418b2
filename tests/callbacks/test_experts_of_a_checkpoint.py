"""A checkpoint that is restored without its experts: transformers' Trainer does it where their names on disk differ."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moe_precision import HistoryError, find_moe_layers
from moe_precision.callbacks import PrecisionAnnealTrainerCallback, RouterNormMonitor, RouterNormTrainerCallback
from moe_precision.quantize.codec.grid import GridError
from moe_precision.recording.expert_samples import ExpertSamples
from tests.support.models import PlainMoE, build
from tests.support.trainers import Module, data, monitor, trainer

IDS = torch.randint(3, 128, (8, 8), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
FAMILY = "qwen3_moe"  # the router is mlp.gate.weight on disk too, the experts are not: mlp.experts.0.up_proj.weight


def train(folder, callback, steps=2, resume=None, model=None, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "learning_rate": 1e-5, **changes}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(build(FAMILY) if model is None else model, arguments, None, ROWS, ROWS[:2], callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def recorder():
    return RouterNormTrainerCallback(group_size=64, statistics_batches=0, method="router_norm")


@pytest.mark.slow
def test_a_resume_that_restores_routers_without_experts_is_an_error(tmp_path):
    train(tmp_path, recorder())
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(
        HistoryError, match=r"experts of this model are not those .* at step 2 \(\d+ matrices.*from_pretrained"
    ):
        train(tmp_path, recorder(), 4, checkpoint)
    resumed = recorder()  # as the message says; in bfloat16 too
    train(tmp_path, resumed, 4, checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16"))
    assert resumed.history.steps == [0, 2, 4]


@pytest.mark.slow
def test_annealing_is_not_resumed_on_other_experts(tmp_path):
    settings = {"start": 1, "average_bits": 2.0, "group_size": 64, "method": "weight_error"}
    train(tmp_path, PrecisionAnnealTrainerCallback(**settings))
    with pytest.raises(GridError, match=r"expert matrices differ.*from_pretrained"):
        train(tmp_path, PrecisionAnnealTrainerCallback(**settings), 4, str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
def test_the_best_checkpoint_without_its_experts_is_reported(tmp_path, recwarn):
    model = train(
        tmp_path,
        recorder(),
        4,
        learning_rate=30.0,  # so that the first checkpoint is the best
        optim="sgd",
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    best = str(tmp_path / "checkpoint-2")
    said = [str(one.message) for one in recwarn if "has not restored the experts" in str(one.message)]
    assert len(said) == 1
    assert f"from_pretrained({best!r})" in said[0]
    saved = AutoModelForCausalLM.from_pretrained(best).state_dict()
    mixed = {name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])}
    assert mixed == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    }


@pytest.mark.slow
def test_the_best_checkpoint_with_its_experts_is_not(tmp_path, recwarn):
    """A step at which nothing is learned: last and best experts are the same."""
    train(tmp_path, recorder(), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=1e-3)
    assert not [one for one in recwarn if "has not restored the experts" in str(one.message)]


class Partial(pl.LightningModule):
    """Saves everything but its experts, and restores what it finds."""

    strict_loading = False

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.moe = PlainMoE()

    def training_step(self, batch, batch_idx):
        return self.moe(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if ".experts." not in name}


def test_lightning_without_strict_loading(tmp_path):
    def fit(steps, checkpoint=None):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=steps,
            callbacks=[RouterNormMonitor(group_size=8, every_n_steps=1, method="router_norm", statistics_batches=0)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Partial(), DataLoader(torch.ones(8, 32), batch_size=2), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(2)
    with pytest.raises(HistoryError, match="experts of this model are not those of the checkpoint at step 2"):
        fit(4, tmp_path / "last.ckpt")


@pytest.mark.slow
def test_a_resumed_run_that_is_trained_on_in_memory_is_no_alarm(tmp_path):
    module, batches = Module(), data(2)
    first = trainer(tmp_path, monitor(), max_epochs=1)
    first.fit(module, batches)
    first.save_checkpoint(tmp_path / "last.ckpt")
    recorder = monitor()
    resumed = trainer(tmp_path, recorder, max_epochs=2)
    resumed.fit(module, batches, ckpt_path=tmp_path / "last.ckpt")
    resumed.fit_loop.max_epochs = 3
    resumed.fit(module, batches)
    assert recorder.history.steps[-1] == 6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_changed_matrix_is_found_in_every_dtype(family, tmp_path):
    model = build(family)
    layers = find_moe_layers(model)
    ExpertSamples.of(layers).save(tmp_path / "samples")
    samples = ExpertSamples.load(tmp_path / "samples")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # as a checkpoint may be saved or loaded
        assert samples.others(find_moe_layers(build(family).to(dtype))) == []
        assert samples.others(find_moe_layers(build(family).to(dtype).float())) == []
    with torch.no_grad():
        layers[1].banks["down_proj"].weights[0].parameter()[3] += 1e-3
    assert samples.others(layers) == [f"expert 3 of {layers[1].name!r} (down_proj)"]
