"""Runs that end unexpectedly: killed, stopped, out of time, on a full disk."""

import os
import resource
import signal

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, Timer
from pytorch_lightning.utilities.exceptions import SIGTERMException

from moe_precision import PrecisionPlan, RouterNormHistory
from moe_precision.callbacks import SavePretrained
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from tests.support.interrupted_run import compare
from tests.support.models import build
from tests.support.processes import finish, start
from tests.support.trainers import Language, Module, data, monitor, trainer


@pytest.mark.slow
def test_kill_and_resume_give_the_same_history_and_plan():
    """One random moment here; ``python -m tests.support.interrupted_run --points 30`` takes more."""
    assert len(compare(points=1, seed=1)) == 1


@pytest.fixture
def python_handlers():
    """The handlers that Python sets itself, also where this process was started with signals ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Stopped(Module):
    """Gets a signal in its sixth batch."""

    def __init__(self, signal_number):
        super().__init__()
        self.signal_number = signal_number

    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            os.kill(os.getpid(), self.signal_number)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("signal_number", "error"), [(signal.SIGINT, (SystemExit, KeyboardInterrupt)), (signal.SIGTERM, SIGTERMException)]
)
def test_a_signal_leaves_a_history_that_makes_a_plan(signal_number, error, tmp_path, capsys, python_handlers):
    with pytest.raises(error):
        trainer(tmp_path, monitor()).fit(Stopped(signal_number), data(40))
    saved = tmp_path / "precision_plan.history.safetensors"
    assert RouterNormHistory.load(saved).steps[:3] == [0, 2, 4]
    assert not (tmp_path / "precision_plan.json").exists()
    arguments = ["plan", str(saved), "--group-size", "32", "-o", str(tmp_path / "later.json")]
    with pytest.warns(UserWarning, match="variances are not known.*change of router norm alone"):
        assert main(arguments) == 0
    plan = PrecisionPlan.load(tmp_path / "later.json")
    assert plan.notes["max_variance"] == "not measured"
    assert plan.last_step >= 4


def run_with_signals_ignored(folder):
    """Two runs in a process as a shell starts it in the background, or ``nohup``: one gets SIGINT, one SIGTERM."""
    ignored = dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)
    for number, handler in ignored.items():
        signal.signal(number, handler)
    trainer(folder / "interrupted", monitor()).fit(Stopped(signal.SIGINT), data(12))
    assert {number: signal.getsignal(number) for number in ignored} == ignored
    with pytest.raises(SIGTERMException):
        trainer(folder / "terminated", monitor()).fit(Stopped(signal.SIGTERM), data(40))
    assert {number: signal.getsignal(number) for number in ignored} == ignored


@pytest.mark.slow
def test_where_signals_are_ignored(tmp_path):
    """SIGINT does nothing and the run ends with its plan; Lightning handles SIGTERM all the same."""
    log = tmp_path / "log.txt"
    finish(start(run_with_signals_ignored, tmp_path, log=log), logs=[log])
    assert PrecisionPlan.load(tmp_path / "interrupted" / "precision_plan.json").last_step == 12
    assert not (tmp_path / "terminated" / "precision_plan.json").exists()
    assert RouterNormHistory.load(tmp_path / "terminated" / "precision_plan.history.safetensors").steps[:3] == [0, 2, 4]


@pytest.mark.slow
def test_max_time_exports(tmp_path):
    class Slow(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                (timer,) = (one for one in self.trainer.callbacks if isinstance(one, Timer))
                timer._offset += 3600  # an hour has passed
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, monitor(), max_time="00:00:30:00", max_epochs=-1).fit(Slow(), data(40))
    assert PrecisionPlan.load(tmp_path / "precision_plan.json").last_step < 40


@pytest.mark.slow
def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    """The plan cannot be written; the model still is, and the history is in memory and in the checkpoint."""
    callback = monitor(group_size=32)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    saver = SavePretrained("saved")
    module = Module(build("mixtral"))
    module.loss = lambda x: module.model(input_ids=x, labels=x).loss
    module.on_train_batch_end = lambda *args: None
    ids = torch.randint(3, 128, (4, 8), generator=torch.Generator().manual_seed(0))
    run = trainer(tmp_path / "plans", callback, saver, checkpoint, enable_checkpointing=True)
    (tmp_path / "plans").mkdir()
    full = (300, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    write = callback._finish

    def finish_on_a_full_disk(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, full)  # every write past 300 bytes fails, as on a full disk
        try:
            return write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    callback._finish = finish_on_a_full_disk
    with (
        pytest.warns(UserWarning, match="could not write"),
        pytest.raises(OSError, match=r"could not write '.*precision_plan.history.safetensors'.*callback\.history"),
    ):
        run.fit(module, torch.utils.data.DataLoader(ids, batch_size=1))
    assert not (tmp_path / "plans" / "precision_plan.json").exists()
    assert not list((tmp_path / "plans").glob(".*"))  # no half-written file
    assert callback.history.steps == [0, 2, 4]
    assert load_model(tmp_path / "plans" / "saved").num_parameters() == module.model.num_parameters()
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    (norms,) = (state for key, state in state["callbacks"].items() if "RouterNormMonitor" in key)
    assert norms["steps"] == [0, 2, 4]
    callback.history.save(tmp_path / "rescued.safetensors")
    assert (
        main(["plan", str(tmp_path / "rescued.safetensors"), "--group-size", "32", "-o", str(tmp_path / "p.json")]) == 0
    )


@pytest.mark.slow
def test_a_norm_that_is_not_finite_is_said_when_it_happens(tmp_path):
    class Diverges(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 4:
                with torch.no_grad():
                    module.model[1].router.weight[2] = float("nan")

    with pytest.warns(UserWarning, match=r"expert 2 of layer 'model\.1' has router norm nan at step 4"):
        trainer(tmp_path, Diverges(), monitor()).fit(Module(), data(6))


@pytest.mark.slow
def test_an_error_in_the_making_of_the_plan_costs_no_model(tmp_path, monkeypatch):
    """Whatever it is: it is raised once the others are done."""

    def out_of_memory(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("moe_precision.callbacks.plan_recorder.plan_of_run", out_of_memory)
    ids = torch.randint(3, 128, (4, 8), generator=torch.Generator().manual_seed(0))
    with (
        pytest.warns(UserWarning, match="no plan is written: RuntimeError: out of memory"),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        trainer(tmp_path, monitor(), SavePretrained()).fit(Language(), torch.utils.data.DataLoader(ids, batch_size=2))
    assert load_model(tmp_path / "checkpoint").num_parameters() > 0
    assert RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors").steps == [0, 2]


@pytest.mark.slow
def test_a_rerun_that_is_stopped_leaves_no_old_plan_beside_its_history(tmp_path):
    """Nor does one that is stopped at once: it leaves what was there."""

    class Fails(Module):
        def __init__(self, batch):
            super().__init__()
            self.batch = batch

        def training_step(self, batch, batch_idx):
            if batch_idx == self.batch:
                raise RuntimeError("stopped")
            return super().training_step(batch, batch_idx)

    names = ["precision_plan.json", "precision_plan.curvature.safetensors", "precision_plan.history.safetensors"]
    trainer(tmp_path, monitor()).fit(Module(), data(4))
    (tmp_path / names[1]).touch()
    before = {name: (tmp_path / name).read_bytes() for name in names}
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, monitor()).fit(Fails(0), data(8))
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, monitor()).fit(Fails(5), data(8))
    assert [(tmp_path / name).exists() for name in names] == [False, False, True]
    assert RouterNormHistory.load(tmp_path / names[2]).steps == [0, 2, 4]
    trainer(tmp_path, monitor()).fit(Module(), data(6))
    assert PrecisionPlan.load(tmp_path / names[0]).last_step == 6
