"""What the callback reports: Weights & Biases, tables, warnings about what is not plain."""

import warnings

import peft
import pytest
import torch
import wandb
from pytorch_lightning.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader

from moe_precision import MoELayerError, PrecisionPlan, RouterNormHistory, allocate
from moe_precision.callbacks import SavePretrained
from tests.support.models import PlainMoE, build
from tests.support.trainers import MemoryLogger, Module, data, monitor, trainer
from tests.support.wandb_file import read_artifacts, read_curves, read_records

# -- Weights & Biases, read back from the offline file ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_run(tmp_path):
    logger = WandbLogger(project="test", offline=True, save_dir=tmp_path)
    callback = monitor()
    trainer(tmp_path, callback, logger=logger).fit(Module(), data(4))
    summary, settings = dict(logger.experiment.summary._as_dict()), logger.experiment.config["moe_precision"]
    wandb.finish()
    wandb.teardown()
    (path,) = tmp_path.rglob("*.wandb")
    curves = read_curves(path)
    for layer in range(2):
        for expert in range(4):
            curve = curves[f"router_norm/layer_{layer:02d}/expert_{expert:03d}"]
            assert [step for step, _ in curve] == [0, 2, 4]
            norms = callback.history.norms[f"model.{layer}"][:, expert]
            torch.testing.assert_close(torch.tensor([value for _, value in curve]), norms)
    assert curves["router_norm_change/heatmap._type"][0][1] == "image-file"
    for layer in range(2):
        assert curves[f"router_norm_curves/layer_{layer:02d}_table._type"][0][1] == "table-file"
    (artifact,) = {a.name: a for a in read_artifacts(path) if a.type == "precision-plan"}.values()
    assert artifact.name.startswith("precision-plan-")
    assert summary["precision_plan/average_bits"] == 2.5
    asked = callback.plan.settings
    assert settings == {**asked.to_dict(), "method": asked.method, "group_size": asked.group_size}
    assert settings["average_bits"] == 2.5
    assert any(record.WhichOneof("record_type") == "exit" for record in read_records(path))


@pytest.mark.slow
def test_a_wandb_logger_is_known_by_its_name(monkeypatch, tmp_path):
    """lightning.pytorch has a WandbLogger of its own, which is not pytorch_lightning's."""
    logged = []

    class Run:
        id, summary = "abc", {}
        log = staticmethod(logged.append)
        log_artifact = staticmethod(logged.append)

    class WandbLogger(MemoryLogger):
        experiment = Run()

    trainer(tmp_path, monitor(), logger=WandbLogger()).fit(Module(), data(2))
    assert "router_norm_change/heatmap" in logged[0]
    assert logged[1].type == "precision-plan"


def test_no_warning_in_a_plain_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*treespec.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*val_dataloader.*|.*logger.*")
        trainer(tmp_path, monitor()).fit(Module(), data())


# -- what is found, and what is not plain -----------------------------------------------------------------------------


def test_a_table_of_what_was_found_at_the_start(tmp_path, caplog):
    caplog.set_level("INFO", logger="pytorch_lightning.utilities.rank_zero")
    trainer(tmp_path, monitor()).fit(Module(nn.Sequential(PlainMoE(), PlainMoE(), PlainMoE(experts=6))), data(2))
    (said,) = [record.message for record in caplog.records if "recording" in record.message]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| model")
    ]
    assert rows == [
        ["model.{0-1}", "router.weight", "4", "0: 64 x 32, 2: 32 x 64", "float32"],
        ["model.2", "router.weight", "6", "0: 64 x 32, 2: 32 x 64", "float32"],
    ]


def test_layers_may_have_different_numbers_of_experts(tmp_path):
    callback = monitor()
    trainer(tmp_path, callback).fit(Module(nn.Sequential(PlainMoE(), PlainMoE(experts=6))), data(3))
    assert [len(layer.bits) for layer in callback.plan.layers.values()] == [4, 6]
    assert callback.history.norms["model.1"].shape == (3, 6)


@pytest.mark.parametrize(
    ("log_experts", "limit", "curves"), [(None, 4096, 8), (None, 7, 0), (True, 7, 8), (False, 4096, 0)]
)
def test_curves_of_experts_up_to_a_limit(log_experts, limit, curves, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_precision.callbacks.plan_recorder.EXPERT_KEYS", limit)
    logger = MemoryLogger()
    trainer(tmp_path, monitor(log_experts=log_experts), logger=logger).fit(Module(), data(2))
    keys = [key for key in logger.calls[0][1] if key.startswith("router_norm")]
    assert sum("expert" in key for key in keys) == curves
    assert sum("expert" not in key for key in keys) == 12  # min, median, max of norm and change, two layers


def test_patterns_reach_the_plan(tmp_path):
    class TwoGates(PlainMoE):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 4, bias=False)

    module = Module(nn.Sequential(TwoGates(), TwoGates()))
    with pytest.raises(MoELayerError, match="several possible routers"):
        trainer(tmp_path, monitor()).fit(module, data(2))
    callback = monitor(router_pattern=r"router\.weight$")
    trainer(tmp_path, callback).fit(module, data(2))
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert plan.patterns["router_pattern"] == r"router\.weight$"
    plan.check(module)  # finds the same layers, by the same pattern
    history = RouterNormHistory.load(tmp_path / "precision_plan.history.safetensors")
    assert allocate(history=history, group_size=32).patterns["router_pattern"] == r"router\.weight$"


def test_a_router_that_is_not_plain_is_said(tmp_path):
    class Deep(PlainMoE):
        def __init__(self):
            super().__init__()
            self.router = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    module = Module(nn.Sequential(Deep(), Deep()))
    module.on_train_batch_end = lambda *args: None
    with pytest.warns(UserWarning, match=r"router of 2 layers .*network of several layers"):
        trainer(tmp_path, monitor()).fit(module, data(2))
    plan = PrecisionPlan.load(tmp_path / "precision_plan.json")
    assert plan.notes["router_caveats"] == {"model.0": "mlp", "model.1": "mlp"}


@pytest.mark.slow
def test_save_pretrained_refuses_adapters_before_the_first_step(tmp_path):
    adapted = peft.get_peft_model(build("mixtral"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    module = Module(adapted)
    module.loss = lambda x: adapted(input_ids=x, labels=x).loss
    module.on_train_batch_end = lambda *args: None
    ids = DataLoader(torch.randint(3, 128, (4, 8)), batch_size=2)
    callback = monitor()
    with pytest.raises(ValueError, match=r"holds PEFT adapters.*merge_and_unload"):
        trainer(tmp_path, callback, SavePretrained()).fit(module, ids)
    assert callback.history.steps == [0]
    trainer(tmp_path, callback).fit(module, ids)
    assert list(callback.plan.layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]  # of the base model


@pytest.mark.slow
def test_the_share_of_experts_that_a_record_has_changed(tmp_path):
    callback, logger = monitor(every_n_steps=1), MemoryLogger()
    trainer(tmp_path, callback, logger=logger).fit(Module(), data(6))
    logged = {step: metrics.get("plan/changed") for step, metrics in logger.records()}
    assert logged[0] is None
    assert logged[1] is None  # the first plan
    highest = []  # at each record the two experts of each layer with the smallest change get 3 bits
    for norms in callback.history.norms.values():
        order = (norms - norms[0]).argsort(dim=1, stable=True)
        highest.append(torch.zeros_like(norms).scatter(1, order[:, :2], 1.0))
    bits = torch.cat(highest, dim=1)
    for step in range(2, 7):
        assert logged[step] == (bits[step] != bits[step - 1]).float().mean().item()
    assert any(logged[step] for step in range(2, 7))
