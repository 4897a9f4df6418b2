"""What annealing begins with: codes that are rounded under the statistics of the steps before it."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from transformers import Trainer, TrainingArguments

from moe_precision import allocate, collect_statistics, find_moe_layers, quantize_model
from moe_precision.annealing.covers import put_bank
from moe_precision.callbacks import PrecisionAnnealTrainerCallback
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.statistics import StatisticsError
from tests.annealing.test_annealing import IDS, Language, anneal, fit
from tests.support.dropped import observed
from tests.support.models import build

pytestmark = pytest.mark.slow


class AtStart(pl.Callback):
    """Keeps the model as it is before the batch after ``step`` steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == self.step:
            self.model = copy.deepcopy(module.model)


@pytest.fixture
def known(monkeypatch):
    """What grids are fitted with, curvature and statistics, in a list."""
    taken, fit_grid = [], Grid.fit

    def watched(layers, plan, curvature=None, statistics=None, **place):
        taken.append((curvature, statistics))
        return fit_grid(layers, plan, curvature, statistics, **place)

    monkeypatch.setattr(Grid, "fit", watched)
    return taken


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_weights_are_placed_on_the_codes_of_the_fit(family):
    model, given, _ = observed(family, batches=2)
    plan = allocate(model, method="random", bits=(1, 2, 3), average_bits=2, group_size=32)
    known = given["curvature"], given["statistics"]
    packed = quantize_model(copy.deepcopy(model), plan, curvature=known[0], statistics=known[1])
    layers = find_moe_layers(model)
    grid = Grid.fit(layers, plan, *known, place=put_bank)
    expected = packed.dequantize().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)
    again = quantize_model(model, plan, grid=grid)  # the nearest codes are those of the fit
    for name, tensor in again.dequantize().state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


def test_annealing_begins_on_codes_rounded_under_the_steps_before_it(tmp_path, known):
    before, after, callback = AtStart(5), AtStart(6), anneal(statistics_steps=4)
    module = Language()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    weight_error = {"method": "weight_error", "start": 5}
    callback = anneal(statistics_steps=4, **weight_error)
    fit(tmp_path, before, callback, after, module=module, steps=7)
    ((_, found),) = known
    expected = collect_statistics(before.model, [{"input_ids": ids} for ids in IDS[4:20].split(4)])
    layers = find_moe_layers(before.model)
    for layer in layers[:1]:  # the first two layers take all four steps, and there are two
        assert torch.equal(found.tokens[layer.name], expected.tokens[layer.name])
        for name in layer.banks:
            ours, theirs = (one.second_moment(layer.name, name, 0) for one in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)
    assert found.text == "the training steps before annealing"
    packed = quantize_model(before.model, callback.plan, statistics=found)
    for name, tensor in packed.dequantize().state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], tensor, atol=0, rtol=0)


def test_where_nothing_is_recorded_codes_are_the_nearest(tmp_path, known):
    fit(tmp_path, anneal())
    assert [statistics for _, statistics in known] == [None]
    with pytest.raises(ValueError, match="statistics_steps must be at least 0, got -1"):
        anneal(statistics_steps=-1)
    with pytest.raises(ValueError, match="method 'statistics' needs expert statistics: give statistics_steps=32"):
        anneal(method="statistics")
    with pytest.raises(ValueError, match="0 among the levels needs expert statistics"):
        anneal(method="statistics", bits=(0, 1, 2))
    plan = allocate(build("mixtral"), method="uniform", average_bits=2, group_size=64)
    with pytest.raises(
        StatisticsError, match="statistics_steps=4 records the steps before annealing, and no step is left before"
    ):
        fit(tmp_path, anneal(start=0, plan=plan, statistics_steps=4))


def test_a_plan_by_statistics_that_drops_experts(tmp_path, known):
    callback = anneal(method="statistics", bits=(0, 1, 2, 3), average_bits=0.75, min_tokens=1, statistics_steps=4)
    module = fit(tmp_path, callback)
    assert callback.plan.method == "statistics"
    assert known[0][1] is not None
    dropped = [(layer, expert) for layer, of in callback.plan.layers.items() for expert in of.dropped]
    assert dropped
    layers = {layer.name: layer for layer in find_moe_layers(module.model)}
    for layer, expert in dropped:
        assert not any(weight.any() for weight in layers[layer].expert_weights(expert).values())


def test_transformers_trainer_records_all_micro_batches(tmp_path, known):
    model = build("mixtral")
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    callback = PrecisionAnnealTrainerCallback(start=3, average_bits=2.0, group_size=64, statistics_steps=3)
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    settings = TrainingArguments(tmp_path, report_to=[], use_cpu=True, save_strategy="no", **args)
    Trainer(model, settings, train_dataset=data, callbacks=[callback]).train()
    ((curvature, found),) = known
    assert curvature is not None
    tokens = [int(of_layer.sum()) for of_layer in found.tokens.values()]
    assert tokens == [3 * 2 * 4 * 12 * 2] * 2  # steps, micro-batches, rows, tokens, experts each


def test_a_run_that_is_resumed_among_the_recorded_steps(tmp_path, known):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path / "whole", anneal(statistics_steps=4), saver, enable_checkpointing=True)
    fit(tmp_path / "resumed", anneal(statistics_steps=4), ckpt_path=str(tmp_path / "saved" / "step=3.ckpt"))
    whole, resumed = (found for _, found in known)
    assert [int(of.sum()) for of in whole.tokens.values()] == [4 * 48 * 2] * 2
    assert [int(of.sum()) for of in resumed.tokens.values()] == [2 * 48 * 2] * 2  # steps 3 and 4


def test_a_run_that_ends_among_the_recorded_steps_leaves_no_hooks(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 4

    module = fit(tmp_path, anneal(start=6, statistics_steps=4), Stop())
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_second_fit_from_a_checkpoint_of_before_annealing(tmp_path):
    callback, module, seen = anneal(start=3, statistics_steps=0), Language(), []

    class See(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append((trainer.global_step, callback.grid is not None))

    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(default_root_dir=tmp_path, max_steps=4, callbacks=[callback, See(), saver], **settings)
    data = torch.utils.data.DataLoader(IDS, batch_size=4)
    trainer.fit(module, data)
    first, seen[:] = callback.grid, []
    trainer.fit(module, data, ckpt_path=tmp_path / "step=1.ckpt")
    assert seen == [(2, False), (3, False), (4, True)]
    assert callback.grid is not first
