"""Runs that had taken their last step when they were killed, and are resumed for the files of their end alone."""

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.callbacks import PrecisionAnneal, SavePretrained
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from moe_precision.quantize.codec.grid import Grid
from tests.support.models import logits
from tests.support.trainers import Language, monitor, trainer

IDS = torch.randint(3, 128, (10, 8), generator=torch.Generator().manual_seed(0))


class Killed(BaseException):
    """Stands for ``kill -9``: nobody gets to write anything."""


class Dies(ModelCheckpoint):
    """The last callback to be called: its checkpoint is there, and nothing that the others do at the end."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        raise Killed


def fit(folder, *callbacks, ckpt_path=None):
    module = Language()
    run = trainer(folder, *callbacks, enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks))
    run.fit(module, DataLoader(IDS, batch_size=2), ckpt_path=ckpt_path)
    return module


def killed(folder, *callbacks):
    with pytest.raises(Killed):
        fit(folder, *callbacks, Dies(folder, save_last=True))
    for path in folder.glob("precision_plan*"):  # what an exception leaves, and kill -9 does not
        path.unlink()
    return folder / "last.ckpt"


@pytest.mark.slow
def test_norms_plan_and_model(tmp_path):
    whole = monitor(group_size=64, statistics_batches=0)
    fit(tmp_path / "whole", whole, SavePretrained())
    last = killed(tmp_path / "part", monitor(group_size=64, statistics_batches=0), SavePretrained())
    resumed = monitor(group_size=64, statistics_batches=0)
    fit(tmp_path / "part", resumed, SavePretrained(), ckpt_path=last)
    assert resumed.history.steps == whole.history.steps == [0, 2, 4, 5]
    written, expected = ((tmp_path / part / "precision_plan.json").read_bytes() for part in ("part", "whole"))
    assert written == expected
    for kind in ("history", "curvature"):
        written, expected = (
            load_file(tmp_path / part / f"precision_plan.{kind}.safetensors") for part in ("part", "whole")
        )
        assert written.keys() == expected.keys()
        assert all(torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()) for name, tensor in written.items())
    torch.testing.assert_close(
        logits(load_model(tmp_path / "part" / "checkpoint")), logits(load_model(tmp_path / "whole" / "checkpoint"))
    )


@pytest.mark.slow
def test_a_run_that_has_its_files_keeps_them(tmp_path):
    """Resumed once more, it has no statistics, and a plan that was made with them is the better one."""
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, monitor(group_size=64, method="auto"), SavePretrained(), checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert PrecisionPlan.load(tmp_path / "precision_plan.json").method == "statistics"
    fit(tmp_path, monitor(group_size=64, method="auto"), SavePretrained(), ckpt_path=tmp_path / "last.ckpt")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_run_that_ended_on_a_grid(tmp_path):
    settings = {"start": 0.5, "average_bits": 2.0, "group_size": 64}
    fit(tmp_path / "whole", PrecisionAnneal(**settings), SavePretrained())
    last = killed(tmp_path / "part", PrecisionAnneal(**settings), SavePretrained())
    fit(tmp_path / "part", PrecisionAnneal(**settings), SavePretrained(), ckpt_path=last)
    plans = [PrecisionPlan.load(tmp_path / part / "annealed_plan.json") for part in ("whole", "part")]
    assert plans[0] == plans[1]
    Grid.load(tmp_path / "part" / "annealed_plan.grid.safetensors")
    found = []
    for part in ("whole", "part"):
        checkpoint, plan, packed = (str(tmp_path / part / name) for name in ("checkpoint", "annealed_plan.json", "q"))
        assert main(["quantize", checkpoint, plan, packed]) == 0
        found.append(logits(load_model(packed)))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_averaged_weights_that_were_not_put_in_place(tmp_path):
    last = killed(tmp_path, WeightAveraging(), monitor(group_size=64), SavePretrained())
    with pytest.warns(UserWarning, match="no plan is written: WeightAveraging has not put the averaged weights in"):
        fit(tmp_path, WeightAveraging(), monitor(group_size=64), SavePretrained(), ckpt_path=last)
    assert not (tmp_path / "precision_plan.json").exists()
    assert not (tmp_path / "checkpoint" / "config.json").exists()
    assert RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors").steps == [0, 2, 4]
