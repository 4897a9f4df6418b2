"""The callback in real Trainers: right steps, right baseline, a plan at the end or a reason why there is none."""

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from moe_precision import HistoryError, MoELayerError, PlanError, PrecisionPlan, RouterNormHistory, allocate
from moe_precision.callbacks import SavePretrained
from moe_precision.checkpoints.checkpoint import load_model
from tests.support.models import PlainMoE, build
from tests.support.trainers import MemoryLogger, Module, TwoOptimizers, data, monitor, trainer


def test_records_plan_and_history(tmp_path):
    callback, logger, module = monitor(), MemoryLogger(), Module()
    before = [layer.router.weight.detach().norm(dim=1).clone() for layer in module.model]
    trainer(tmp_path, callback, logger=logger).fit(module, data(5))

    assert callback.history.steps == [0, 2, 4, 5]  # baseline, every second step, the last step
    assert callback.history.layers.keys() == {"model.0", "model.1"}
    norms = callback.history.norms["model.0"]
    torch.testing.assert_close(norms[0], before[0])
    for row, step in enumerate(callback.history.steps[1:], start=1):
        torch.testing.assert_close(norms[row], module.norms[step])

    # one call per record, at the optimizer step; nothing in the progress bar
    assert [step for step, _ in logger.records()] == [0, 2, 4, 5]
    metrics = logger.records()[-1][1]
    assert metrics["router_norm/layer_00/expert_003"] == pytest.approx(norms[-1, 3].item())
    assert metrics["router_norm_change/layer_00/max"] == pytest.approx((norms[-1] - norms[0]).max().item())
    assert not any("router" in key for key in callback_keys(logger))

    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert plan == callback.plan
    assert plan.layers["model.0"].order == (norms[-1] - norms[0]).argsort().tolist()  # variances are alike: no reorder
    assert plan.layers["model.0"].bits == [3 if e in plan.layers["model.0"].order[:2] else 2 for e in range(4)]
    assert plan.baseline_step == 0
    assert plan.last_step == 5

    # the file holds everything that a plan with other bits needs, without the model
    saved = RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors")
    again = allocate(history=saved, method="router_norm", average_bits=2.5, bits=(2, 3), group_size=32)
    assert again == plan


def callback_keys(logger):
    return [key for _, m in logger.calls if "router_norm/layer_00/expert_000" not in m for key in m]


@pytest.mark.slow
def test_never_in_the_progress_bar(tmp_path):
    run = trainer(tmp_path, monitor())
    run.fit(Module(), data())
    assert "loss" in run.progress_bar_metrics
    assert not any("router" in key for key in {**run.progress_bar_metrics, **run.callback_metrics})


def test_every_logger_gets_every_record(tmp_path):
    loggers = [MemoryLogger(), MemoryLogger(), CSVLogger(tmp_path / "csv")]
    trainer(tmp_path, monitor(), logger=loggers).fit(Module(), data(4))
    assert [step for step, _ in loggers[0].records()] == [step for step, _ in loggers[1].records()] == [0, 2, 4]
    text = next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert "router_norm/layer_01/expert_003" in text.splitlines()[0]


def test_diverged_training_writes_no_plan_and_stops_nobody(tmp_path):
    class Diverges(Module):
        def on_train_end(self):
            with torch.no_grad():  # the module's hook runs after the callbacks'; here it marks that it was reached
                self.norms["end"] = True

        def on_train_batch_end(self, *args):
            with torch.no_grad():
                self.model[1].experts[2][0].weight.fill_(float("nan"))

    module = Diverges()
    with pytest.warns(UserWarning, match=r"no plan is written: .*of layer 'model\.[01]' has router norm"):
        trainer(tmp_path, monitor()).fit(module, data(2))
    assert module.norms["end"]
    assert not (tmp_path / "precision_plan.json").exists()
    assert (tmp_path / "precision_plan.history.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"accumulate_grad_batches": 2}, [0, 2, 3]),  # 6 batches, 3 optimizer steps
        ({"max_steps": 3, "max_epochs": None}, [0, 2, 3]),
        ({"limit_train_batches": 1}, [0, 1]),
        ({"max_epochs": 2}, [0, 2, 4, 6, 8, 10, 12]),
        ({"log_every_n_steps": 0}, [0, 6]),  # logging off: first and last
        ({"log_every_n_steps": 50}, [0, 6]),
    ],
)
def test_steps(settings, steps, tmp_path):
    callback = monitor()
    trainer(tmp_path, callback, **settings).fit(Module(), data())
    assert callback.history.steps == steps
    assert (tmp_path / "precision_plan.json").is_file()


def test_every_n_steps_overrides_the_trainer(tmp_path):
    callback = monitor(every_n_steps=1)
    trainer(tmp_path, callback).fit(Module(), data(3))
    assert callback.history.steps == [0, 1, 2, 3]


def test_two_optimizers(tmp_path):
    callback = monitor(every_n_steps=3)
    trainer(tmp_path, callback).fit(TwoOptimizers(), data())  # global_step: 2, 4, .. 12
    assert callback.history.steps == [0, 4, 6, 10, 12]


@pytest.mark.slow
def test_early_stopping_still_exports(tmp_path):
    stop = EarlyStopping("loss", patience=0, check_on_train_epoch_end=True, mode="max")
    trainer(tmp_path, monitor(), stop, max_epochs=20).fit(Module(), data())
    assert PrecisionPlan.load(tmp_path / "precision_plan.json").last_step < 120


@pytest.mark.slow
def test_resume_keeps_the_baseline_and_gives_the_same_plan(tmp_path):
    whole = monitor(every_n_steps=1)
    trainer(tmp_path / "whole", whole, max_epochs=2).fit(Module(), data())

    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    first = monitor(every_n_steps=1)
    trainer(tmp_path / "part", first, checkpoint, enable_checkpointing=True).fit(Module(), data())
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)  # plain types and tensors only
    assert any("RouterNormMonitor" in key for key in state["callbacks"])

    second = monitor(every_n_steps=1)
    run = trainer(tmp_path / "part", second, max_epochs=2)
    run.fit(Module(), data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert second.history.steps == whole.history.steps == list(range(13))
    for name in ("model.0", "model.1"):
        assert torch.equal(second.history.norms[name], whole.history.norms[name])
    assert second.plan == whole.plan
    assert second.plan.baseline_step == 0


@pytest.mark.slow
def test_resume_without_our_state_is_said(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, checkpoint, enable_checkpointing=True).fit(Module(), data())
    callback = monitor()
    run = trainer(tmp_path, callback, max_epochs=2)
    with pytest.warns(UserWarning, match="resumes at step 6 from a checkpoint without router norms for export_to"):
        run.fit(Module(), data(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert callback.plan.baseline_step == 6


@pytest.mark.slow
def test_a_restored_run_with_other_routers_is_an_error(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, monitor(), checkpoint, enable_checkpointing=True).fit(Module(), data())
    path = tmp_path / "ckpt" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    for change in (lambda weight: weight.mul_(1.0001), lambda weight: weight.fill_(float("nan"))):
        change(saved["state_dict"]["model.1.router.weight"])
        torch.save(saved, path)
        with pytest.raises(
            HistoryError, match="routers of this model are not those whose norms were recorded at step 6"
        ):
            trainer(tmp_path, monitor(), max_epochs=2).fit(Module(), data(), ckpt_path=path)


@pytest.mark.slow
def test_a_history_of_another_run_is_not_gone_on_with(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, checkpoint, enable_checkpointing=True).fit(Module(), data(4))  # no norms in it
    callback = monitor()
    trainer(tmp_path, callback).fit(Module(), data(8))
    with pytest.warns(UserWarning, match="resumes at step 4 from a checkpoint without router norms"):
        trainer(tmp_path, callback, max_epochs=2).fit(Module(), data(4), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert callback.history.steps == [4, 6, 8]


@pytest.mark.slow
def test_resume_with_another_model_is_an_error(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, monitor(), checkpoint, enable_checkpointing=True).fit(Module(), data(2))
    path = tmp_path / "ckpt" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "RouterNormMonitor" in key)
    state["layers"] = {f"other.{name}": layer for name, layer in state["layers"].items()}
    torch.save(saved, path)
    with pytest.raises(HistoryError, match="the checkpoint's router norms are of layers"):
        trainer(tmp_path, monitor(), max_epochs=2).fit(Module(), data(2), ckpt_path=path)


@pytest.mark.slow
def test_a_second_fit_starts_anew(tmp_path):
    callback = monitor()
    for _ in range(2):
        trainer(tmp_path, callback).fit(Module(), data(4))
        assert callback.history.steps == [0, 2, 4]


def test_a_fit_after_a_crash_takes_its_own_baseline(tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("at once")

    callback = monitor()
    with pytest.raises(RuntimeError, match="at once"):
        trainer(tmp_path, callback).fit(Fails(), data(4))
    module = Module()
    with torch.no_grad():
        module.model[0].router.weight.mul_(3)
    expected = module.model[0].router.weight.detach().norm(dim=1)
    trainer(tmp_path, callback).fit(module, data(4))
    torch.testing.assert_close(callback.history.first["model.0"], expected)


def test_a_frozen_router_is_said(tmp_path):
    module = Module()
    for layer in module.model:
        layer.router.weight.requires_grad = False
    with pytest.warns(UserWarning, match="did not change at all.*frozen"):
        trainer(tmp_path, monitor()).fit(module, data(4))


@pytest.mark.slow
def test_weight_averaging_behind_the_monitor_is_said(tmp_path):
    for averaging in (WeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-2)):
        with pytest.warns(UserWarning, match="WeightAveraging comes later.*Put RouterNormMonitor after it"):
            trainer(tmp_path, monitor(), averaging).fit(Module(), data(2))
    for batches in (5, 6):  # without and with a record of the last step before it is averaged
        callback, module, logger = monitor(), Module(), MemoryLogger()
        trainer(tmp_path, WeightAveraging(), callback, logger=logger).fit(module, data(batches))
        final = module.model[0].router.weight.detach().norm(dim=1)  # what the run ends with, averaged
        torch.testing.assert_close(callback.history.last["model.0"], final)
        assert logger.records()[-1][1]["router_norm/layer_00/expert_001"] == pytest.approx(final[1].item())


@pytest.mark.slow
def test_two_monitors(tmp_path):
    two = monitor(export_to="plan_a.json"), monitor(export_to="plan_b.json", average_bits=2.0)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, *two, checkpoint, enable_checkpointing=True).fit(Module(), data())
    assert PrecisionPlan.load(tmp_path / "plan_a.json").average_bits == 2.5
    assert PrecisionPlan.load(tmp_path / "plan_b.json").average_bits == 2.0
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert sum("RouterNormMonitor" in key for key in state["callbacks"]) == 2


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"limit_train_batches": 0}])
def test_no_step_no_plan_and_a_reason(settings, tmp_path):
    with pytest.warns(UserWarning, match="no plan is written"):
        trainer(tmp_path, monitor(), **settings).fit(Module(), data())
    assert not list(tmp_path.glob("*.json"))


def test_fast_dev_run_writes_nothing(tmp_path):
    callback = monitor()
    trainer(tmp_path, callback, fast_dev_run=2).fit(Module(), data())
    assert callback.plan is not None
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_the_history(tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, monitor()).fit(Fails(), data(8))
    history = RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors")
    assert history.steps == [0, 2, 4]
    assert allocate(history=history, group_size=32).last_step == 4
    assert not (tmp_path / "precision_plan.json").exists()


@pytest.mark.slow
def test_names_are_the_checkpoints(tmp_path):
    """Layers are named relative to the transformers model, not to the LightningModule, and a compiled one too."""

    class LM(Module):
        def loss(self, x):
            return self.model(input_ids=x, labels=x).loss

        def on_train_batch_end(self, *args):
            pass

    tokens = DataLoader(torch.randint(3, 128, (8, 8)), batch_size=4)
    callback = monitor()
    saved = SavePretrained(dtype="bfloat16")
    trainer(tmp_path, callback, saved).fit(LM(build("mixtral")), tokens)
    assert list(callback.plan.layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    model = load_model(tmp_path / "checkpoint")
    assert model.dtype == torch.bfloat16
    callback.plan.check(model)


# -- bad input, each before any work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"average_bits": 1.5}, "outside the levels"),
        ({"bits": (1, 2, 4), "average_bits": 2}, "equally spaced"),
        ({"bits": (2, 12)}, "bits must be 1 to 8, 16"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"every_n_steps": 0}, "at least 1 or None, got 0"),
        ({"export_to": "plan.yaml"}, r"must end in \.json"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        monitor(**arguments)


def test_an_export_path_that_cannot_be_written_is_found_in_setup(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    module = Module()
    with pytest.raises(OSError, match=r"cannot write .*file/plan\.json"):
        trainer(tmp_path, monitor(export_to=str(tmp_path / "file" / "plan.json"))).fit(module, data())
    assert not module.norms  # not one step was taken


@pytest.mark.slow
def test_bad_models_are_found_before_the_first_step(tmp_path):
    for model, settings, error, message in (
        (nn.Linear(32, 32), {}, MoELayerError, "no Mixture-of-Experts layer"),
        (nn.Sequential(PlainMoE(), PlainMoE(router=False)), {}, MoELayerError, "have no router"),
        (nn.Sequential(PlainMoE()), {"group_size": 128}, PlanError, "does not divide"),
    ):
        module = Module(model)
        with pytest.raises(error, match=message):
            trainer(tmp_path, monitor(**settings)).fit(module, data())
        assert not module.norms


def test_save_pretrained_wants_a_transformers_model(tmp_path):
    with pytest.raises(ValueError, match="no transformers model"):
        trainer(tmp_path, SavePretrained()).fit(Module(), data(1))
    with pytest.raises(ValueError, match="dtype must be one of bfloat16"):
        SavePretrained(dtype="int8")
