"""What is known when training starts is refused then: several models, and optimizers that keep no second moments."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from moe_precision import AllocationError, HistoryError, MoELayerError, RouterNormHistory, router_norms
from moe_precision.callbacks import PrecisionAnneal, RouterNormTrainerCallback, SavePretrained
from moe_precision.callbacks.restored import check_restored
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.layers.module_tree import root_model
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.curvature import CurvatureError
from moe_precision.recording.expert_samples import ExpertSamples
from moe_precision.recording.gradients import curvature_of_losses
from moe_precision.recording.optimizer_check import check_second_moments
from tests.support.models import DECODER, PlainMoE, build
from tests.support.trainers import Module, TwoOptimizers, data, monitor, trainer

IDS = torch.randint(3, 128, (8, 8), generator=torch.Generator().manual_seed(0))
LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


class Distill(Module):
    """A student that learns from a teacher; batches are those of the module, not of a model."""

    def __init__(self, frozen=True, teacher="qwen3_moe"):
        super().__init__()
        del self.model
        dense = AutoConfig.for_model("llama", **DECODER)
        self.teacher = AutoModelForCausalLM.from_config(dense) if teacher == "llama" else build(teacher)
        self.student = build("mixtral", num_hidden_layers=2)
        self.teacher.requires_grad_(not frozen)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            expected = self.teacher(input_ids=batch).logits
        return (self.student(input_ids=batch).logits - expected).square().mean()

    def on_train_batch_end(self, *args):
        pass


def fit(folder, module, *callbacks, **changes):
    trainer(folder, *callbacks, **changes).fit(module, DataLoader(IDS, batch_size=2))


def anneal(**changes):
    return PrecisionAnneal(**{"start": 0.5, "average_bits": 2.0, "group_size": 64, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "named"),
    [
        ({}, {}),  # the teacher is frozen
        ({"teacher": "llama", "frozen": False}, {}),  # and here has no experts
        ({"frozen": False}, {"module": "student"}),
    ],
)
def test_plan_and_checkpoint_are_the_students(module, named, tmp_path):
    made = Distill(**module)
    recorded, saved = monitor(group_size=64, **named), SavePretrained(module="student")
    fit(tmp_path, made, recorded, saved)
    assert list(recorded.plan.layers) == LAYERS
    assert recorded.plan.model_type == "mixtral"
    model = load_model(tmp_path / "checkpoint")
    recorded.plan.check(model)
    router = made.student.model.layers[1].mlp.gate.weight
    torch.testing.assert_close(model.model.layers[1].mlp.gate.weight, router)
    torch.testing.assert_close(recorded.history.last[LAYERS[1]], router.detach().norm(dim=1))
    tokens = {int(load[0].sum()) for load in recorded.history.loads["training"].values()}
    assert tokens == {8 * 8 * 2}  # of the student's forward passes


@pytest.mark.slow
def test_a_frozen_teacher_needs_no_name(tmp_path):
    recorded = monitor(group_size=64, statistics_batches=2)
    fit(tmp_path, Distill(), recorded, SavePretrained())
    recorded.plan.check(load_model(tmp_path / "checkpoint"))
    assert {int(tokens.sum()) for tokens in recorded.statistics.tokens.values()} == {2 * 2 * 8 * 2}


@pytest.mark.slow
def test_annealing_of_a_student(tmp_path):
    for module, named in ((Distill(), {}), (Distill(frozen=False), {"module": "student"})):
        annealing = anneal(**named)
        teacher = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
        fit(tmp_path, module, annealing, SavePretrained(**named))
        assert list(annealing.plan.layers) == LAYERS
        Grid.load(tmp_path / "annealed_plan.grid.safetensors").check_router_norms(
            {layer.name: layer.row_norms() for layer in find_moe_layers(load_model(tmp_path / "checkpoint"))}, "grid"
        )
        assert all(torch.equal(tensor, teacher[name]) for name, tensor in module.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: monitor(group_size=64), r"trains 2 models with experts, student, teacher, .*module='student'"),
        (anneal, r"trains 2 models with experts, student, teacher, .*module='student'"),
        (SavePretrained, r"trains 2 transformers models, teacher, student: .*SavePretrained\(module="),
        (lambda: monitor(module="pupil"), r"no module 'pupil' in Distill; its models are: teacher, student"),
    ],
)
def test_two_models_that_are_trained(callback, message, tmp_path):
    made = Distill(frozen=False)
    before = made.student.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, made, callback())
    assert torch.equal(made.student.lm_head.weight, before)


def test_which_model_names_are_relative_to():
    distill, both = Distill(), Distill(frozen=False)
    assert root_model(distill) is distill.student
    assert root_model(both) is both
    assert [layer.name for layer in find_moe_layers(distill)] == LAYERS
    assert len(find_moe_layers(both)) == 4
    distill.student.requires_grad_(False)
    assert root_model(distill) is distill
    frozen = build("mixtral").requires_grad_(False)
    assert root_model(nn.Sequential(frozen)) is frozen


@pytest.mark.slow
def test_a_student_under_transformers_trainer(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = build("qwen3_moe"), build("mixtral")

        def forward(self, input_ids, labels=None):
            with torch.no_grad():
                expected = self.teacher(input_ids=input_ids).logits
            return {"loss": (self.student(input_ids=input_ids).logits - expected).square().mean()}

    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    with pytest.raises(MoELayerError, match="module='student'"):
        Trainer(Pair(), arguments, train_dataset=rows, callbacks=[RouterNormTrainerCallback(group_size=64)]).train()
    callback = RouterNormTrainerCallback(group_size=64, module="student")
    Trainer(Pair(), arguments, train_dataset=rows, callbacks=[callback]).train()
    assert list(callback.plan.layers) == LAYERS
    assert callback.plan.model_type == "mixtral"


# -- optimizers -------------------------------------------------------------------------------------------------------


class WithSGD(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["curvature", "statistics"])
def test_a_method_that_reads_moments_and_an_optimizer_without(method, tmp_path):
    module = WithSGD()
    with pytest.raises(CurvatureError, match=r"SGD is not among the optimizers.*curvature_batches=64"):
        trainer(tmp_path, monitor(method=method, bits=(1, 2, 3))).fit(module, data())
    assert module.norms == {}  # taken by the module after every step
    gradients = monitor(method="curvature", bits=(1, 2, 3), curvature_batches=2)
    trainer(tmp_path, gradients).fit(WithSGD(), data())
    assert gradients.plan.method == "curvature"


@pytest.mark.slow
def test_auto_takes_gradients_of_its_own_where_an_optimizer_keeps_none(tmp_path, monkeypatch):
    """On a single process, with a loss that can be computed, and for experts that are not too many."""
    said = []
    monkeypatch.setattr("moe_precision.callbacks.plan_of_run.rank_zero_info", said.append)
    automatic = monitor(method="auto", statistics_batches=0)
    module = WithSGD()
    trainer(tmp_path, automatic).fit(module, data())
    assert automatic.plan.method == "curvature"
    assert [text for text in said if "SGD is not among" in text and "squared gradients of 64 training batches" in text]
    expected = curvature_of_losses(find_moe_layers(module), [partial(module.loss, batch) for batch in data()])
    for name, rows in expected.rows.items():
        torch.testing.assert_close(automatic.curvature.rows[name], rows)
    monkeypatch.setattr("moe_precision.callbacks.plan_of_run.UNASKED_WEIGHTS", 10)  # a large model
    large = monitor(method="auto", statistics_batches=0)
    with pytest.warns(UserWarning, match="the plan will be by the paper's rule"):
        trainer(tmp_path, large).fit(WithSGD(), data())
    assert large.plan.method == "router_norm"


@pytest.mark.slow
def test_what_the_papers_rule_cannot_do_instead_of_auto(tmp_path, monkeypatch):
    """Whole layers share a width only by costs, which SGD and steps of the module's own leave no way to know."""
    module, asked = TwoOptimizers(), {"method": "auto", "granularity": "layer", "bits": (1, 2, 3)}
    with pytest.raises(AllocationError, match="granularity='layer' needs what each width costs"):
        trainer(tmp_path, monitor(**asked)).fit(module, data())
    monkeypatch.setattr("moe_precision.callbacks.plan_of_run.UNASKED_WEIGHTS", 10)  # a large model
    recorded = monitor(**asked)
    trainer(tmp_path, recorded).fit(Module(), data())
    assert recorded.plan.settings.granularity == "layer"


@pytest.mark.parametrize(
    ("optimizer", "keeps"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), True),
        (lambda p: torch.optim.Adam([{"params": list(p), "lr": 0.0}]), True),
        (lambda p: torch.optim.Adafactor(p), True),
        (lambda p: torch.optim.SGD(p, lr=0.1), False),
        (lambda p: torch.optim.Rprop(p), False),
        (lambda p: torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))]), True),  # trains no expert: unknown
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), False),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_what_an_optimizer_will_keep(optimizer, keeps, family):
    model = build(family)
    layers, made = find_moe_layers(model), optimizer(model.parameters())
    state, weights = torch.get_rng_state(), model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    if keeps:
        check_second_moments(layers, [made])
    else:
        with pytest.raises(CurvatureError, match=r"is not among the optimizers|adds the weight decay"):
            check_second_moments(layers, [made])
    assert torch.equal(torch.get_rng_state(), state)
    assert not made.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


# -- schedule-free optimizers ----------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.AdamW):
    """`eval` would put the averaged weights into the model."""

    def eval(self):
        pass


def test_a_resume_under_a_schedule_free_optimizer_is_no_error():
    """The record may be of the weights where gradients are taken, and the checkpoint of their average."""
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral", {})
    history.record(5, router_norms(layers))
    fresh = RouterNormHistory.of(layers, "mixtral", {})
    free, plain = ScheduleFree(model.parameters()), torch.optim.AdamW(model.parameters())
    experts = ExpertSamples.of(layers)
    check_restored(history, fresh, layers, 5, "Owner", (), experts)
    with torch.no_grad():
        layers[0].banks["down_proj"].weights[0].parameter()[2].mul_(1.001)
    with pytest.warns(UserWarning, match=r"1 expert matrices are not those of the checkpoint.*schedule-free"):
        check_restored(history, fresh, layers, 5, "Owner", [free], experts)
    with pytest.raises(HistoryError, match=r"expert 2 of 'model\.layers\.0\.mlp' \(down_proj\) the first"):
        check_restored(history, fresh, layers, 5, "Owner", [plain], experts)
    with torch.no_grad():
        layers[0].router_is.parameter().mul_(1.001)
    with pytest.warns(UserWarning, match=r"norms differ by up to 0.10% from those recorded at step 5.*schedule-free"):
        check_restored(history, fresh, layers, 5, "Owner", [free])
    with pytest.raises(HistoryError, match="the checkpoint was not restored"):
        check_restored(history, fresh, layers, 5, "Owner", [plain])


def test_a_schedule_free_optimizer_is_told_at_the_start(tmp_path):
    class WithIt(Module):
        def configure_optimizers(self):
            return ScheduleFree(self.parameters(), lr=1e-2)

    with pytest.warns(UserWarning, match=r"schedule-free.*call optimizer.eval\(\)"):
        trainer(tmp_path, monitor(method="router_norm")).fit(WithIt(), data(2))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            lambda folder: [monitor(export_to="checkpoint/plan.json")],
            "RouterNormMonitor writes into it",
        ),
        (lambda folder: [ModelCheckpoint(folder / "checkpoint")], "ModelCheckpoint writes into it"),
        (lambda folder: [SavePretrained(dtype="bfloat16")], "SavePretrained writes into it"),
    ],
)
def test_two_callbacks_in_the_folder_of_the_model(others, message, tmp_path):
    with pytest.raises(ValueError, match=f"SavePretrained replaces the folder .*{message}"):
        fit(tmp_path, Distill(), *others(tmp_path), SavePretrained(), enable_checkpointing=None)
    fit(
        tmp_path,
        Distill(),
        ModelCheckpoint(tmp_path),
        monitor(group_size=64),
        SavePretrained(),
        enable_checkpointing=None,
    )
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    assert (tmp_path / "precision_plan.json").is_file()


@pytest.mark.slow
def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a checkpoint folder"):
        fit(tmp_path, Distill(), SavePretrained())

    class Writes(Distill):
        def on_train_epoch_end(self):
            (tmp_path / "later" / "notes.txt").write_text("mine")

    with pytest.warns(UserWarning, match="The model is saved in .*later-1"):
        fit(tmp_path, Writes(), SavePretrained("later"))
    assert load_model(tmp_path / "later-1").num_parameters() > 0
    assert [file.name for file in (tmp_path / "later").iterdir()] == ["notes.txt"]


# -- modules that are not of transformers -----------------------------------------------------------------------------


class PlainPair(Module):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(PlainMoE(experts=6)).requires_grad_(False)
        self.average = AveragedModel(self.model)

    def on_train_batch_end(self, *args):
        self.average.update_parameters(self.model)


@pytest.mark.slow
def test_a_frozen_part_is_asked_about_and_an_average_is_no_model(tmp_path):
    recorded = monitor()
    with pytest.warns(UserWarning, match=r"1 of 3 layers are frozen, 'teacher\.0' the first.*module='student'"):
        trainer(tmp_path, recorded).fit(PlainPair(), data())
    assert list(recorded.plan.layers) == ["model.0", "model.1", "teacher.0"]
    named = monitor(module="model")
    trainer(tmp_path, named).fit(PlainPair(), data())
    assert list(named.plan.layers) == ["0", "1"]


@pytest.mark.slow
def test_an_average_beside_the_model(tmp_path):
    class Averaged(Distill):
        def __init__(self):
            super().__init__()
            self.average = AveragedModel(self.student)

    recorded = monitor(group_size=64)
    fit(tmp_path, Averaged(), recorded, SavePretrained())
    recorded.plan.check(load_model(tmp_path / "checkpoint"))


def test_experts_behind_adapters(tmp_path):
    module = Module(build("switch_transformers"))
    inject_adapter_in_model(LoraConfig(target_modules=["wi"]), module.model)
    layers = find_moe_layers(module)
    with pytest.raises(CurvatureError, match=r"behind an adapter.*curvature_batches=64"):
        check_second_moments(layers, [])
