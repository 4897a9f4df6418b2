"""``import lightning as L``: its classes are not those of pytorch_lightning, and ours work with both."""

import json

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from moe_precision import PrecisionPlan
from moe_precision.annealing.covers import AnnealError
from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor, SavePretrained
from moe_precision.callbacks.lightning_packages import averages_weights, is_called
from moe_precision.checkpoints.checkpoint import load_model
from tests.support.models import PlainMoE, build
from tests.support.trainers import Module, data, monitor, trainer

OURS = (RouterNormMonitor, PrecisionAnneal, SavePretrained)
IDS = torch.randint(3, 128, (8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def package(request):
    """One of the two packages."""
    return pytest.importorskip(request.param)


def module_of(package, model):
    class Language(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            if isinstance(self.model, nn.Sequential):
                return (self.model(batch) - batch).square().mean()
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Language()


def fit(package, folder, *callbacks, model=None, **changes):
    model = build("mixtral") if model is None else model
    module = module_of(package, model)
    run = package.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        **{"max_epochs": 1, **changes},
    )
    batches = data(4) if isinstance(model, nn.Sequential) else torch.utils.data.DataLoader(IDS, batch_size=2)
    run.fit(module, batches)
    return module


def test_they_are_callbacks_of_both(package):
    assert all(issubclass(ours, package.Callback) for ours in OURS)


@pytest.mark.slow
def test_a_run_of_either(package, tmp_path):
    recorded = monitor(group_size=64)
    module = fit(package, tmp_path, recorded, SavePretrained())
    assert recorded.history.steps == [0, 2, 4]
    PrecisionPlan.load(tmp_path / "precision_plan.json").check(load_model(tmp_path / "checkpoint"))
    router = module.model.model.layers[1].mlp.gate.weight.detach()
    torch.testing.assert_close(recorded.history.last["model.layers.1.mlp"], router.norm(dim=1))


@pytest.mark.slow
def test_an_accumulation_that_changes_between_epochs(package, tmp_path):
    """Four batches in two steps, then in four: half of the six steps is three."""
    scheduler = package.callbacks.GradientAccumulationScheduler({0: 2, 1: 1})
    recorded, anneal = monitor(group_size=64), PrecisionAnneal(start=0.5, group_size=64)
    fit(package, tmp_path, recorded, anneal, scheduler, max_epochs=2)
    assert recorded.history.steps == [0, 2, 4, 6]
    assert anneal._began_at == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_weight_averaging_of_either(package, name, tmp_path):
    if not hasattr(package.callbacks, name):
        pytest.skip(f"this release has no {name}")
    arguments = {"swa_lrs": 1e-2} if name.startswith("Stochastic") else {}
    with pytest.warns(UserWarning, match=f"{name} comes later.*Put RouterNormMonitor after it"):
        fit(package, tmp_path, monitor(), getattr(package.callbacks, name)(**arguments), model=_plain())
    with pytest.raises(AnnealError, match=f"{name} averages weights"):
        fit(package, tmp_path, PrecisionAnneal(group_size=64), getattr(package.callbacks, name)(**arguments))


@pytest.mark.slow
def test_the_cli_of_either_takes_ours_by_name(package, tmp_path, monkeypatch):
    cli = pytest.importorskip(f"{package.__name__}.cli")
    monkeypatch.chdir(tmp_path)
    ours = [{"class_path": "RouterNormMonitor", "init_args": {"average_bits": 2.5}}, {"class_path": "SavePretrained"}]
    arguments = [f"--trainer.callbacks={json.dumps(ours)}", "--trainer.accelerator=cpu"]
    made = cli.LightningCLI(type(module_of(package, _plain())), args=arguments, run=False, save_config_callback=None)
    assert [type(one) for one in made.trainer.callbacks if isinstance(one, OURS)] == [RouterNormMonitor, SavePretrained]


def test_a_wandb_logger_of_either_and_what_inherits_from_it(package):
    class Mine(package.loggers.WandbLogger):
        pass

    assert is_called(object.__new__(Mine), "WandbLogger")
    assert not is_called(object.__new__(package.loggers.CSVLogger), "WandbLogger")


# -- averages of other packages, which have names of their own --------------------------------------------------------


class KeepsAverage(pytorch_lightning.Callback):
    """Somebody's own average of the weights."""

    def setup(self, trainer, pl_module, stage):
        self.ema = AveragedModel(pl_module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.ema.update_parameters(pl_module)

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.ema.module.state_dict())


class KeepsShadow(pytorch_lightning.Callback):
    """An average that nothing tells from outside: plain tensors."""

    def on_train_start(self, trainer, pl_module):
        self.first = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_end(self, trainer, pl_module):
        now = pl_module.state_dict()
        pl_module.load_state_dict({name: (tensor + now[name]) / 2 for name, tensor in self.first.items()})


@pytest.mark.slow
def test_an_averaged_model_is_seen_when_training_starts(tmp_path):
    assert not averages_weights(KeepsShadow())
    with pytest.warns(UserWarning, match="KeepsAverage comes later"):
        trainer(tmp_path, monitor(), KeepsAverage()).fit(Module(), data(4))
    with pytest.raises(AnnealError, match="KeepsAverage averages weights"):
        fit(pytorch_lightning, tmp_path, KeepsAverage(), PrecisionAnneal(start=0.5, group_size=64))


@pytest.mark.slow
def test_weights_that_change_behind_our_back_are_said(tmp_path):
    recorded = monitor()
    with pytest.warns(UserWarning, match="changed after training had ended and the last norms were read"):
        trainer(tmp_path, recorded, KeepsShadow()).fit(Module(), data(4))

    class Later(Module):
        def on_train_end(self):
            with torch.no_grad():
                self.model[0].router.weight.mul_(1.5)

    with pytest.warns(UserWarning, match="changed after training had ended"):
        trainer(tmp_path, monitor()).fit(Later(), data(4))
    settings = {"start": 0.5, "group_size": 64, "average_bits": 2.0}
    with pytest.warns(UserWarning, match="changed after they had been moved onto the grid"):
        fit(pytorch_lightning, tmp_path, PrecisionAnneal(**settings), KeepsShadow())
    with pytest.warns(UserWarning, match="changed after the last step, by another callback"):
        fit(pytorch_lightning, tmp_path, KeepsShadow(), PrecisionAnneal(**settings))


def _plain():
    torch.manual_seed(0)
    return nn.Sequential(PlainMoE(), PlainMoE())
