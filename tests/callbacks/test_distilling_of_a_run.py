"""Scales that the callbacks distill at the end of a run: those of a packed copy of the model, on the same batches."""

import copy
import errno

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import seed_everything
from pytorch_lightning.callbacks import Callback
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

from moe_precision import PrecisionPlan, distill_scales, load_model, quantize_model
from moe_precision.callbacks import RouterNormMonitor, RouterNormTrainerCallback, SavePretrained
from moe_precision.callbacks import statistics_recorder as recorder
from moe_precision.cli.main import main
from moe_precision.quantize.codec.grid import Grid, GridError
from moe_precision.quantize.matrices import PackedMatrices
from moe_precision.quantize.trainable import DistillError
from tests.callbacks.test_finished_runs import fit, killed
from tests.callbacks.test_statistics_of_a_run import OfAModel
from tests.support.models import build, logits
from tests.support.trainers import Module, TwoOptimizers, data, monitor, trainer

STEPS = 14
SETTINGS = {"method": "uniform", "group_size": 32, "average_bits": 2, "statistics_batches": 8, "distill_steps": STEPS}
ROWS = torch.randn(16384, 32, generator=torch.Generator().manual_seed(0))
PLAN, GRID = "precision_plan.json", "precision_plan.grid.safetensors"


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (96, 24), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def loader() -> DataLoader:
    return DataLoader(rows(), batch_size=8)


def held(model) -> list[torch.Tensor]:
    """All codes, scales and offsets of a packed model."""
    found = [one for one in model.modules() if isinstance(one, PackedMatrices)]
    return [part for one in found for part in one.matrices(list(range(one.shape[0])))]


def assert_equal(found, expected) -> None:
    assert len(held(found)) == len(held(expected)) > 0
    assert all(map(torch.equal, held(found), held(expected)))


def divergence(model, packed) -> float:
    with torch.no_grad():
        pairs = [[one(input_ids=b["input_ids"]).logits.log_softmax(-1) for one in (model, packed)] for b in loader()]
    return sum(float(F.kl_div(b, a, reduction="batchmean", log_target=True)) for a, b in pairs)


def packed_copy(model, plan, **known):
    return quantize_model(copy.deepcopy(model), plan, **known)


class KeepsState(Callback):
    """The random state at the end of a run."""

    def on_fit_end(self, trainer, pl_module):
        self.state = torch.get_rng_state()


def trained(folder, **changes):
    seed_everything(0, verbose=False)
    module, callback, state = OfAModel(), RouterNormMonitor(**{**SETTINGS, **changes}), KeepsState()
    trainer(folder, callback, state, SavePretrained(), max_epochs=2, max_steps=-1).fit(module, loader())
    return module.model, callback, state.state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model, its callback, the random state after it, and the folder of its files."""
    folder = tmp_path_factory.mktemp("run")
    return *trained(folder), folder


@pytest.mark.slow
def test_what_is_left_is_what_distilling_a_packed_copy_gives(run):
    """Bit for bit, from the file and in memory; and it is closer to the float model than without distilling."""
    model, callback, _, folder = run
    plain = packed_copy(model, callback.plan, curvature=callback.curvature, statistics=callback.statistics)
    expected = copy.deepcopy(plain)
    distill_scales(expected, model, list(loader()), steps=STEPS)
    found = packed_copy(model, folder / PLAN)  # with what is beside it
    assert_equal(found, expected)
    assert_equal(packed_copy(model, callback.plan, grid=callback.grid), expected)
    assert all(map(torch.equal, held(plain)[::4], held(found)[::4]))  # codes
    assert divergence(model, found) < 0.98 * divergence(model, plain)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.slow
def test_the_run_is_that_without_distilling(run, tmp_path):
    model, _, state, _ = run
    other, callback, other_state = trained(tmp_path, distill_steps=0)
    assert torch.equal(state, other_state)
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    assert callback.grid is None
    assert not (tmp_path / GRID).exists()


@pytest.mark.slow
def test_the_command_takes_the_file_by_itself(run, tmp_path, capsys):
    model, callback, _, folder = run
    command = ["quantize", str(folder / "checkpoint"), str(folder / PLAN)]
    assert main([*command, str(tmp_path / "q")]) == 0
    printed = capsys.readouterr().out
    assert f"takes codes and distilled scales from {folder / GRID}, which a run has left" in printed
    assert_equal(load_model(tmp_path / "q"), packed_copy(model, callback.plan, grid=callback.grid))
    assert main([*command, str(tmp_path / "plain"), "--grid", "none"]) == 0
    assert "rounds under the statistics of" in capsys.readouterr().out
    assert not torch.equal(logits(load_model(tmp_path / "q")), logits(load_model(tmp_path / "plain")))
    assert main([*command, str(tmp_path / "again"), "--distill-steps", "2"]) == 2
    assert "leave it out, or the grid (--grid none)" in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(run, tmp_path):
    """A plan that was edited, weights whose routers moved, and experts that moved alone."""
    model, callback, _, folder = run
    name = next(iter(callback.plan.layers))
    edited = callback.plan.with_bits({name: [3] * 8})
    with pytest.raises(GridError, match="the grid belongs to another plan: widths or group size differ"):
        packed_copy(model, edited, grid=folder / GRID)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.get_parameter(f"{name}.experts.down_proj")[5, 7].mul_(1.1)
    with pytest.raises(ValueError, match="the experts were changed after their scales had been distilled"):
        packed_copy(moved, callback.plan, grid=folder / GRID)
    packed_copy(copy.deepcopy(model).bfloat16(), callback.plan, grid=folder / GRID)  # the same in another dtype
    with torch.no_grad():
        moved.get_parameter(f"{name}.gate.weight").mul_(1.1)
    with pytest.raises(GridError, match="belongs to other weights"):
        packed_copy(moved, callback.plan.widths_only(), grid=folder / GRID)
    short = {kind: dict(getattr(callback.grid, kind)[name]) for kind in ("scales", "offsets", "codes", "sums")}
    short["codes"]["down_proj"] = short["codes"]["down_proj"][:-1]
    Grid(callback.plan, **{k: {**getattr(callback.grid, k), name: v} for k, v in short.items()}).save(tmp_path / "x")
    with pytest.raises(GridError, match=r"tensor 'codes/.*down_proj' has shape"):
        Grid.load(tmp_path / "x")


@pytest.mark.thorough
def test_mixed_precision(run, tmp_path):
    """Under autocast scales are trained in float32 all the same: what comes out is close to what float32 gives."""
    model, callback, *_ = run
    module = OfAModel()
    module.model.load_state_dict(model.state_dict())
    half = RouterNormMonitor(**SETTINGS)
    fitting = trainer(tmp_path, half, precision="bf16-mixed", max_epochs=1, limit_train_batches=1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fitting.fit(module, loader())
    assert half.plan.diff(callback.plan) == []
    plain = packed_copy(model, half.plan, statistics=half.statistics)
    full = divergence(model, packed_copy(model, callback.plan, grid=callback.grid))
    found = divergence(model, packed_copy(model, half.plan.widths_only(), grid=half.grid))
    assert found < divergence(model, plain)
    assert found == pytest.approx(full, rel=0.1)


@pytest.mark.slow
def test_of_transformers_trainer(tmp_path):
    model, callback = build("mixtral").train(), RouterNormTrainerCallback(**SETTINGS)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    HFTrainer(model, arguments, train_dataset=rows(), callbacks=[callback]).train()
    known = {"curvature": callback.curvature, "statistics": callback.statistics}
    expected = packed_copy(model, callback.plan, **known)
    distill_scales(expected, model, list(loader()), steps=STEPS)
    assert_equal(packed_copy(model, tmp_path / PLAN), expected)


@pytest.mark.slow
def test_experts_that_are_modules(tmp_path):
    """Through the module's own training step."""
    module, callback = Module(), monitor(average_bits=2.0, statistics_batches=16, distill_steps=12)
    for layer in module.model:
        for expert in layer.experts:
            expert.requires_grad_(False)  # frozen experts are quantized too
    trainer(tmp_path, callback).fit(module, DataLoader(ROWS, batch_size=1024))
    plain = packed_copy(module, callback.plan, statistics=callback.statistics, curvature=callback.curvature)
    found = packed_copy(module, callback.plan, grid=Grid.load(tmp_path / GRID))
    errors = [errors_of(module, one) for one in (found, plain)]
    assert all(map(torch.lt, *errors))
    assert all(map(torch.equal, held(plain)[::4], held(found)[::4]))  # codes
    assert not any(parameter.requires_grad for layer in module.model for parameter in layer.experts.parameters())


def errors_of(module, packed) -> list[torch.Tensor]:
    """Squared error of the outputs of both layers, the second given what the first packed one makes."""
    x, found = ROWS, []
    with torch.no_grad():
        for layer, own in zip(module.model, packed.model, strict=True):
            found.append((own(x) - layer(x)).square().mean())
            x = own(x)
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distill_steps": -1}, "distill_steps must be at least 0, got -1"),
        (
            {"distill_steps": 2, "statistics_batches": 0},
            "distill_steps=2 needs expert statistics, and statistics_batches=0 collects none",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    for kind in (RouterNormMonitor, RouterNormTrainerCallback):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_what_cannot_be_is_refused_before_training(tmp_path, monkeypatch):
    asked = {"statistics_batches": 2, "distill_steps": 2}
    with pytest.raises(ValueError, match="statistics_batches=2 needs automatic optimization"):
        trainer(tmp_path, monitor(**asked)).fit(TwoOptimizers(), data())

    class Wrapped(Module):
        def __init__(self):
            super().__init__()
            self.model[1] = checkpoint_wrapper(self.model[1])

    with pytest.raises(DistillError, match=r"'model\.1\.experts\.0\.0\.weight' is behind a wrapper of Wrapped: unwrap"):
        trainer(tmp_path, monitor(**asked)).fit(Wrapped(), data())
    module = Module()
    with monkeypatch.context() as patched:
        patched.setattr(recorder, "AUTOMATIC_BYTES", 1000)
        with pytest.raises(ValueError, match="distill_steps=2 needs expert statistics, and none are collected: their"):
            trainer(tmp_path, monitor(distill_steps=2)).fit(module, data())
    assert not module.norms
    assert not (tmp_path / PLAN).exists()


@pytest.mark.slow
def test_a_failure_stops_nobody_and_leaves_no_file_of_an_earlier_run(tmp_path, monkeypatch):
    """Neither one that distilling meets, nor a disk that is full in the middle of its file."""
    (tmp_path / GRID).write_bytes(b"of an earlier run")

    class Fails(Module):
        def loss(self, x):
            if self.trainer.train_dataloader is not None and not torch.is_grad_enabled() and self.fails:
                raise RuntimeError("out of memory")
            return super().loss(x)

    module, callback = Fails(), monitor(statistics_from=0.5, distill_steps=2)
    module.fails = True
    with pytest.warns(UserWarning, match="no scales are distilled: RuntimeError: out of memory"):
        trainer(tmp_path, callback).fit(module, data())
    assert PrecisionPlan.load(tmp_path / PLAN).last_step == 6
    assert not (tmp_path / GRID).exists()

    def breaks(tensors, path, metadata):
        if any(name.startswith("codes/") for name in tensors):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(OSError, match=r"could not write .*grid\.safetensors': No space left"):
        trainer(tmp_path, monitor(statistics_batches=2, distill_steps=2)).fit(Module(), data())
    assert (tmp_path / PLAN).is_file()
    assert not (tmp_path / GRID).exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_run_that_is_resumed_for_its_end_distills_nothing(tmp_path):
    """Where batches no longer run. What stands beside the plan then is not of other weights."""
    last = killed(tmp_path, monitor(group_size=64, statistics_batches=2, distill_steps=2))
    (tmp_path / GRID).write_bytes(b"of an earlier run")
    resumed = monitor(group_size=64, statistics_batches=2, distill_steps=2)
    with pytest.warns(UserWarning, match="no scales are distilled, since no batch runs after a training that had end"):
        fit(tmp_path, resumed, ckpt_path=last)
    assert (tmp_path / PLAN).is_file()
    assert not (tmp_path / GRID).exists()
    assert resumed.grid is None
