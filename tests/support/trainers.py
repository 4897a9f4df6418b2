"""Small Lightning modules, data, loggers and trainers, for tests of the callbacks."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from torch import nn
from torch.utils.data import DataLoader

from moe_precision.callbacks import RouterNormMonitor
from tests.support.models import PlainMoE, build


class MemoryLogger(Logger):
    """Keeps each call of log_metrics."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name = version = "memory"

    @property
    @rank_zero_experiment
    def experiment(self):
        return None

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def records(self):
        return [(step, m) for step, m in self.calls if "router_norm/layer_00/expert_000" in m]


class Module(pl.LightningModule):
    """A model of two PlainMoE layers that learns the identity."""

    def __init__(self, model=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = model or nn.Sequential(PlainMoE(), PlainMoE())
        self.norms = {}  # global step -> norms of layer 0, taken by the module itself

    def loss(self, x):
        return (self.model(x) - x).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args):
        self.norms[self.trainer.global_step] = self.model[0].router.weight.detach().norm(dim=1).clone()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Language(Module):
    """A small transformers model that learns rows of tokens."""

    def __init__(self, model=None):
        super().__init__(build("mixtral") if model is None else model)

    def loss(self, x):
        return self.model(input_ids=x, labels=x).loss

    def on_train_batch_end(self, *args):
        pass  # it has no first layer of its own, whose norms `Module` takes


class TwoOptimizers(Module):
    """Manual optimization with two optimizers: global_step rises by two per batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.model]


def data(batches=6):
    return DataLoader(torch.randn(batches * 8, 32, generator=torch.Generator().manual_seed(0)), batch_size=8)


def monitor(**changes):
    return RouterNormMonitor(
        **{"method": "router_norm", "average_bits": 2.5, "bits": (2, 3), "group_size": 32, **changes}
    )


def trainer(tmp_path, *callbacks, logger=False, **changes):
    settings = {"max_epochs": 1, "log_every_n_steps": 2, "enable_progress_bar": False, "enable_checkpointing": False}
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=logger,
        enable_model_summary=False,
        **{**settings, **changes},
    )
