"""``start`` as a share of training: at the same batch however many steps the optimizers take in it."""

import pytest
import pytorch_lightning as pl
import torch

from moe_precision.callbacks.lightning_packages import total_steps
from tests.annealing.test_annealing import Language, anneal, fit

pytestmark = pytest.mark.slow


class Several(Language):
    """Steps an optimizer of the experts in every batch, and one of the rest in every ``every``-th."""

    automatic_optimization = False
    every = 1

    def training_step(self, batch, batch_idx):
        experts, others = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer, steps in ((experts, True), (others, batch_idx % self.every == 0)):
            if steps:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        experts = [p for n, p in self.named_parameters() if "experts" in n]
        others = [p for n, p in self.named_parameters() if "experts" not in n]
        return torch.optim.AdamW(experts, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)


class Watched(pl.Callback):
    """Batches that were trained on before the first one on the grid."""

    def __init__(self, annealing):
        self.annealing, self.before = annealing, 0

    def on_train_batch_end(self, *args):
        self.before += self.annealing.grid is None


def before(folder, module, **changes):
    annealing = anneal(start=0.5)
    watched = Watched(annealing)
    fit(folder, annealing, watched, module=module, **changes)
    return watched.before


ROWS = torch.randint(3, 128, (32, 12), generator=torch.Generator().manual_seed(0))  # 8 batches


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("limits", [{"max_epochs": 2, "steps": -1}, {"max_epochs": 2, "steps": 1000}])
def test_of_two_epochs_of_eight_batches_annealing_has_the_second(every, limits, tmp_path):
    module = Several()
    module.every = every
    assert before(tmp_path, module, data=ROWS, **limits) == 8


def test_of_max_steps_it_has_half(tmp_path):
    """max_steps counts the steps of every optimizer, as Lightning does: 12 of them are six batches."""
    assert before(tmp_path, Several(), data=ROWS, steps=12) == 3
    assert before(tmp_path, Several(), data=ROWS, steps=12, max_epochs=100) == 3


def test_one_optimizer_is_as_it_was(tmp_path):
    assert before(tmp_path, Language(), data=ROWS, steps=-1, max_epochs=2) == 8
    assert before(tmp_path, Language(), data=ROWS, steps=-1, max_epochs=2, accumulate_grad_batches=2) == 8


def test_a_run_that_is_resumed_where_annealing_begins(tmp_path):
    """Nine batches, so that the middle lies between two: the run that goes on is not taken for one without a grid."""
    rows = torch.cat([ROWS, ROWS[:4]])
    settings = {"data": rows, "steps": -1, "max_epochs": 1}
    for stop in (4, 5):
        folder = tmp_path / str(stop)
        saver = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=2 * stop, save_top_k=-1, filename="x")
        fit(folder, anneal(), saver, module=Several(), enable_checkpointing=True, **settings)
        resumed = anneal()
        fit(folder, resumed, module=Several(), ckpt_path=folder / "x.ckpt", **settings)
        assert resumed.grid is not None


def test_what_nobody_knows_is_infinite(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(total_steps(trainer, pl_module))

    for module in (Language(), Several()):
        for changes in ({"max_time": "00:00:00:01", "max_epochs": -1}, {"max_epochs": -1, "steps": 3}):
            fit(tmp_path, Look(), module=module, **{"steps": -1, "limit_train_batches": 1, **changes})
    assert seen == [float("inf"), 3, float("inf"), 3]
