"""What the callback does about curvature: where it takes it from, when it writes it, and what may go wrong."""

from functools import partial

import pytest
import torch
from pytorch_lightning import Callback

from moe_precision import PrecisionPlan, allocate, find_moe_layers
from moe_precision.recording.curvature import Curvature, CurvatureError
from moe_precision.recording.gradients import curvature_of_losses
from tests.support.trainers import Module, TwoOptimizers, data, monitor, trainer


@pytest.mark.slow
def test_the_callback_writes_it_and_its_plan_is_that_of_the_file(tmp_path):
    callback = monitor(method="curvature", bits=(1, 2, 3), granularity="expert+projection")
    module = Module()
    trainer(tmp_path, callback).fit(module, data())
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert plan == callback.plan
    assert plan.method == "curvature"
    assert plan.average_bits <= 2.5
    curvature = Curvature.load(tmp_path / "precision_plan.curvature.safetensors")
    again = allocate(
        module.model and module,
        callback.history,
        method="curvature",
        average_bits=2.5,
        bits=(1, 2, 3),
        group_size=32,
        curvature=curvature,
        granularity="expert+projection",
    )
    assert again.diff(plan) == []
    assert set(plan.layers["model.0"].costs["0"]) == {1, 2, 3}


@pytest.mark.slow
def test_an_optimizer_without_second_moments_still_makes_the_papers_plan(tmp_path):
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(tmp_path, monitor(method="router_norm")).fit(Plain(), data())
    assert (tmp_path / "precision_plan.json").is_file()
    assert not list(tmp_path.glob("*.curvature.*"))
    with pytest.raises(CurvatureError, match="SGD is not among the optimizers"):
        trainer(tmp_path, monitor(method="curvature")).fit(Plain(), data())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_takes_gradients_where_the_optimizer_keeps_none(accumulate, tmp_path):
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback, module = monitor(method="curvature", curvature_batches=3), Plain()
    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(module, data())
    assert PrecisionPlan.load(tmp_path / "precision_plan.json").method == "curvature"
    found = Curvature.load(tmp_path / "precision_plan.curvature.safetensors")
    batches = [batch for _, batch in zip(range(3), data(), strict=False)]
    expected = curvature_of_losses(find_moe_layers(module), [partial(module.loss, batch) for batch in batches])
    for name in expected.layers:
        torch.testing.assert_close(found.rows[name]["0"], expected.rows[name]["0"])
    assert callback.history.loads["training"]["model.0"][0].sum() == 6 * 8  # the extra batches are not counted


def test_gradients_need_automatic_optimization(tmp_path):
    with pytest.raises(ValueError, match="curvature_batches=2 needs automatic optimization"):
        trainer(tmp_path, monitor(method="curvature", curvature_batches=2)).fit(TwoOptimizers(), data())


@pytest.mark.slow
def test_the_extra_batches_leave_the_model_as_it_was(tmp_path):
    class Normed(Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(32)

        def loss(self, x):
            return super().loss(self.norm(x))

        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Normed()
    callback = monitor(curvature_batches=100)
    with pytest.warns(UserWarning, match="only 6 batches to take gradients on"):
        trainer(tmp_path, callback).fit(module, data())
    assert callback.curvature is not None
    assert module.norm.num_batches_tracked == 5  # of training alone
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(one._forward_pre_hooks for one in module.modules())


@pytest.mark.slow
def test_curvature_of_an_earlier_run_does_not_stay_beside_a_new_plan(tmp_path):
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(tmp_path, monitor()).fit(Module(), data())
    assert (tmp_path / "precision_plan.curvature.safetensors").is_file()
    trainer(tmp_path, monitor(method="router_norm")).fit(Plain(), data())
    assert not (tmp_path / "precision_plan.curvature.safetensors").exists()


@pytest.mark.slow
def test_a_full_disk_or_a_weight_without_scales_stop_nobody(tmp_path, monkeypatch):
    class Last(Callback):
        reached = False

        def on_train_end(self, *args):
            self.reached = True

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    last = Last()
    monkeypatch.setattr(Curvature, "save", full)
    with pytest.raises(OSError, match=r"could not write '.*curvature\.safetensors'"):
        trainer(tmp_path / "a", monitor(), last).fit(Module(), data())
    assert last.reached
    monkeypatch.undo()

    module, last = Module(), Last()
    with torch.no_grad():
        module.model[1].experts[2][0].weight.fill_(0).add_(torch.randn(64, 32) * 1e-9)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.0)
    with pytest.warns(
        UserWarning, match=r"no plan is written: '0' of expert 2 in layer 'model\.1': .* leave it at 16 bits"
    ):
        trainer(tmp_path / "b", monitor(method="weight_error"), last).fit(module, data())
    assert last.reached
