"""Statistics that the callbacks take from training's own last steps, and those that they collect unasked."""

import itertools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

from moe_precision import find_moe_layers
from moe_precision.callbacks import RouterNormMonitor, RouterNormTrainerCallback, statistics_recorder
from moe_precision.recording import in_turn
from moe_precision.recording.router_norms import norms_by_layer
from moe_precision.recording.statistics import ExpertStatistics
from tests.callbacks.test_statistics_of_a_run import NAME, OfAModel, rows
from tests.support.models import build
from tests.support.trainers import Module, TwoOptimizers, data, monitor, trainer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_layer_at_a_time(monkeypatch):
    monkeypatch.setattr(in_turn, "TOGETHER", 1)


class Watched:
    """What the experts of each layer of a Mixtral are given in training mode, forward pass by forward pass."""

    def __init__(self, model):
        self.calls = {layer.name: [] for layer in find_moe_layers(model)}
        for layer in find_moe_layers(model):
            layer.container().register_forward_pre_hook(lambda m, args, name=layer.name: self._see(m, args, name))

    def _see(self, module, args, name):
        if module.training and torch.is_grad_enabled():
            self.calls[name].append([value.detach().clone() for value in args[:3]])

    def moment(self, layer, passes, expert):
        """The second moment of the first matrix's inputs over some forward passes, one token after the other."""
        total, tokens = torch.zeros(64, 64, dtype=torch.float64), 0
        for hidden, index, weights in (self.calls[layer][i] for i in passes):
            for token, place in (index == expert).nonzero().tolist():
                x = hidden.reshape(-1, 64)[token].double() * weights[token, place].double()
                total, tokens = total + x.outer(x), tokens + 1
        return total / max(tokens, 1), tokens


def assert_of_passes(found: ExpertStatistics, watched: Watched, passes: dict[str, range]) -> None:
    for name, of_layer in passes.items():
        for expert in range(8):
            moment, tokens = watched.moment(name, of_layer, expert)
            assert found.tokens[name][expert] == tokens
            torch.testing.assert_close(
                found.second_moment(name, "gate_up_proj", expert).double(), moment, rtol=2e-3, atol=2e-3
            )


LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_steps_under_lightning(accumulate, tmp_path):
    module = OfAModel()
    watched = Watched(module.model)
    callback = RouterNormMonitor(group_size=64, statistics_from=0.5)
    run = trainer(tmp_path, callback, max_epochs=4, max_steps=8, accumulate_grad_batches=accumulate)
    run.fit(module, DataLoader(rows() * accumulate, batch_size=3))
    found = ExpertStatistics.load(tmp_path / NAME)
    a = accumulate
    assert_of_passes(found, watched, {LAYERS[0]: range(4 * a, 6 * a), LAYERS[1]: range(6 * a, 8 * a)})
    assert found.text == f"the last 50 % of training, {2 * a * 3 * 10 * 2} routed tokens per layer"
    norms = norms_by_layer(find_moe_layers(module.model))
    assert all(torch.equal(found.router_norms[name], norms[name]) for name in LAYERS)  # those of the end
    assert all(len(one._forward_pre_hooks) < 2 for one in module.modules())  # the test's own


def test_validation_in_the_last_steps_does_not_count(tmp_path):
    class Validated(OfAModel):
        def validation_step(self, batch, batch_idx):
            self.model.train()  # as nobody should
            with torch.no_grad():
                self.model(**batch)

    module = Validated()
    watched = Watched(module.model)
    run = trainer(tmp_path, RouterNormMonitor(group_size=64, statistics_from=0.5), max_steps=8, max_epochs=-1)
    batches = DataLoader(rows(), batch_size=3)
    run.fit(module, batches, batches)
    found = ExpertStatistics.load(tmp_path / NAME)
    assert_of_passes(found, watched, {LAYERS[0]: range(4, 6), LAYERS[1]: range(6, 8)})


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_last_steps_under_transformers_trainer(reentrant, tmp_path):
    """With accumulation and gradient checkpointing, whose second forward passes do not count."""
    model = build("mixtral").train()
    callback = RouterNormTrainerCallback(group_size=64, statistics_from=0.5)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    HFTrainer(model, arguments, train_dataset=rows() * 2, callbacks=[callback]).train()
    found = ExpertStatistics.load(tmp_path / NAME)
    for tokens in found.tokens.values():
        assert tokens.sum() == 2 * 3 * 10 * 2  # one step each: micro-batches, rows, tokens, experts per token
    assert "the last 50 % of training" in found.text
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_bfloat16_autocast(tmp_path):
    module = OfAModel()
    watched = Watched(module.model)
    callback = RouterNormMonitor(group_size=64, statistics_from=0.5)
    run = trainer(tmp_path, callback, max_steps=4, max_epochs=-1, precision="bf16-mixed")
    run.fit(module, DataLoader(rows(), batch_size=3))
    assert_of_passes(callback.statistics, watched, {LAYERS[0]: range(2, 3), LAYERS[1]: range(3, 4)})


def test_a_run_that_does_not_say_its_steps(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return itertools.repeat(torch.randn(32))

    run = trainer(tmp_path, monitor(statistics_from=0.9), max_epochs=-1, max_time="00:00:00:30")
    with pytest.raises(ValueError, match=r"does not say how many it takes: set max_steps, or .*statistics_batches=32"):
        run.fit(Module(), DataLoader(Endless(), batch_size=8))


def test_training_that_ends_early(tmp_path):
    class Stops(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.global_step == 4 else None  # ends the epoch

    with pytest.warns(UserWarning, match=r"ended before step 6, and 1 of 2 layers had no turn: 'model\.1', "):
        trainer(tmp_path, monitor(statistics_from=0.34)).fit(Stops(), data())
    assert (tmp_path / "precision_plan.json").is_file()
    assert not (tmp_path / NAME).exists()


def test_weights_that_are_changed_after_the_last_step(tmp_path):
    callback = monitor(statistics_from=0.5)
    with pytest.warns(UserWarning, match="the experts' statistics are those of the steps before"):
        trainer(tmp_path, WeightAveraging(), callback).fit(Module(), data())
    assert callback.statistics.text.endswith("whose weights were changed after the last step")


def test_a_resumed_run_shares_out_the_steps_that_are_left(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    quiet = {"enable_checkpointing": True}
    trainer(tmp_path, monitor(statistics_from=0.3), checkpoint, **quiet).fit(Module(), data())
    callback = monitor(statistics_from=0.3)
    trainer(tmp_path, callback).fit(Module(), data(), ckpt_path=tmp_path / "c" / "step=4.ckpt")
    assert callback.statistics.text == "the last 33 % of training, 8 routed tokens per layer"


def test_a_hook_that_fails_stops_nobody(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("moe_precision.recording.collector.Collector._add", fails)
    with pytest.warns(UserWarning, match="no statistics are written: RuntimeError: out of memory"):
        trainer(tmp_path, monitor(statistics_from=0.5)).fit(Module(), data())
    assert (tmp_path / "precision_plan.json").is_file()
    assert not (tmp_path / NAME).exists()


def test_compiled_experts_are_never_half_counted(tmp_path):
    class Compiled(Module):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(self.model, backend="eager")

        def on_train_batch_end(self, *args):
            pass

    with pytest.warns(UserWarning, match=r"no statistics are written: .*no input of .* was seen.*\(compiled"):
        trainer(tmp_path, monitor(statistics_from=0.5)).fit(Compiled(), data())
    assert (tmp_path / "precision_plan.json").is_file()
    assert not (tmp_path / NAME).exists()


# -- unasked ----------------------------------------------------------------------------------------------------------


def test_unasked_after_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics_recorder, "AUTOMATIC", 3)
    module, callback = OfAModel(), RouterNormMonitor(group_size=64)
    batches = DataLoader(rows(), batch_size=3, shuffle=True)
    trainer(tmp_path, callback, max_steps=4, max_epochs=-1).fit(module, batches)
    assert ExpertStatistics.load(tmp_path / NAME).text == "3 training batches of the run that the plan is of"


class Fails(Module):
    """Runs a training batch only in training mode."""

    def training_step(self, batch, batch_idx):
        if not self.training:
            raise AttributeError("no such thing")
        return super().training_step(batch, batch_idx)


class Logs(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"mode": float(self.training)}, on_epoch=True)
        return loss


def test_unasked_it_never_breaks_a_run(tmp_path):
    with pytest.warns(UserWarning, match="no statistics are written: AttributeError: no such thing"):
        trainer(tmp_path, monitor()).fit(Fails(), data())
    assert (tmp_path / "precision_plan.json").is_file()
    assert not (tmp_path / NAME).exists()
    trainer(tmp_path / "own", monitor()).fit(TwoOptimizers(), data())
    assert (tmp_path / "own" / "precision_plan.json").is_file()
    assert not (tmp_path / "own" / NAME).exists()


def test_unasked_it_changes_nothing_else(tmp_path):
    outcomes = []
    for batches in (None, 0):
        pl.seed_everything(1)
        module, folder = Logs(), tmp_path / str(batches)
        run = trainer(folder, monitor(statistics_batches=batches))
        run.fit(module, DataLoader(torch.randn(48, 32), batch_size=8, shuffle=True))
        assert (folder / NAME).exists() == (batches is None)
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        outcomes.append((metrics, module.state_dict(), torch.randn(3), (folder / "precision_plan.json").read_bytes()))
    (metrics, weights, draw, plan), (other_metrics, other_weights, other_draw, other_plan) = outcomes
    assert metrics == other_metrics
    assert metrics["mode"] == 1
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    assert torch.equal(draw, other_draw)
    assert plan == other_plan


def test_a_loader_that_is_exhausted(tmp_path):
    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(torch.randn(48, 32))

        def __iter__(self):
            return self.rows

    with pytest.warns(UserWarning, match="no statistics are written: .* no input of .* was seen. Was there no batch"):
        trainer(tmp_path, monitor(), max_steps=6, max_epochs=-1).fit(Module(), DataLoader(Once(), batch_size=8))
    assert (tmp_path / "precision_plan.json").is_file()


def test_a_large_file_is_not_written_unasked(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(statistics_recorder, "AUTOMATIC_BYTES", 1000)
    said = []
    monkeypatch.setattr(statistics_recorder, "rank_zero_info", said.append)
    trainer(tmp_path, monitor()).fit(Module(), data())
    (line,) = said
    assert "Ask for them with statistics_batches=32 or statistics_from=0.95" in line
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("asked", [{"statistics_batches": 2}, {"statistics_from": 0.5}])
def test_a_disk_that_is_too_small_is_said_before_training(asked, tmp_path, monkeypatch):
    class Begins(Module):
        said = False

        def on_train_start(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(statistics_recorder, "_free", lambda folder: 1000)
    with pytest.warns(UserWarning, match=r"take a file of .* MB, and .* has 0\.0 MB left"), pytest.raises(SystemExit):
        trainer(tmp_path, monitor(**asked)).fit(Begins(), data())


def test_switched_off_there_is_no_hook(tmp_path):
    class Looks(Module):
        def training_step(self, batch, batch_idx):
            for module in self.modules():
                for hook in module._forward_pre_hooks.values():
                    assert "loads" in type(hook).__module__  # of the load counter
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, monitor(statistics_batches=0)).fit(Looks(), data())
    assert not (Path(tmp_path) / NAME).exists()
