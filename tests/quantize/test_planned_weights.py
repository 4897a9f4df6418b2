"""A plan says which weights it was made for: others are refused with a way out, on the command line and in Python."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_precision import (
    PlanError,
    PlanQuantizationConfig,
    PrecisionPlan,
    RouterNormHistory,
    allocate,
    load_model,
    quantize_checkpoint,
    quantize_model,
)
from moe_precision.cli.main import main
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.beside import PlanFiles
from moe_precision.recipes.text_data import train_tokenizer
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.gradients import curvature_of_losses
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build


@pytest.fixture
def steps(tmp_path):
    """A run whose best weights are those of step 3, ``best``, and whose plan is of step 5, ``last``."""
    model = build("mixtral", vocab_size=300)
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    for step, scale in ((0, 1.0), (3, 1.1), (5, 1.2)):
        with torch.no_grad():
            for layer in layers:
                layer.router_is.read().mul_(torch.linspace(1, scale, 8)[:, None])
        history.record(step, router_norms(layers))
        if step == 3:
            model.save_pretrained(tmp_path / "best")
    history.measure_variance(layers)
    history.save(tmp_path / "plan.history.safetensors")
    allocate(history=history, group_size=64, method="router_norm").save(tmp_path / "plan.json")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "last")  # rounding is no other weights
    return tmp_path


def ways(folder, plan):
    """Every way to quantize a checkpoint by a plan's file."""
    config = PlanQuantizationConfig(plan)
    return (
        lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=copy.deepcopy(config)),
        lambda: quantize_model(load_model(folder), plan),
        lambda: quantize_checkpoint(folder, plan, folder.parent / "out"),
    )


@pytest.mark.slow
def test_a_plan_is_for_its_own_weights(steps, capsys):
    plan = steps / "plan.json"
    for way in ways(steps / "best", plan):
        with pytest.raises(PlanError, match=r"the plan belongs to other weights: router norms in 'model.layers.0.mlp'"):
            way()
    for way in ways(steps / "last", plan):
        way()
    assert main(["quantize", str(steps / "best"), str(plan), str(steps / "no")]) == 2
    assert "moe-precision plan HISTORY --final CHECKPOINT" in capsys.readouterr().err
    assert not (steps / "no").exists()


@pytest.mark.slow
def test_the_ways_out_of_the_message_work(steps):
    history, best = str(steps / "plan.history.safetensors"), str(steps / "best")
    assert main(["plan", history, "--final", best, "--group-size", "64", "-o", str(steps / "of_best.json")]) == 0
    assert PrecisionPlan.load(steps / "of_best.json").baseline_step == 0
    assert main(["quantize", best, str(steps / "of_best.json"), str(steps / "one")]) == 0
    PrecisionPlan.load(steps / "plan.json").widths_only().save(steps / "widths.json")
    assert main(["quantize", best, str(steps / "widths.json"), str(steps / "two")]) == 0
    uniform = allocate(steps / "last", method="uniform", average_bits=2, group_size=64)  # of no weights in particular
    quantize_model(load_model(best), uniform)


@pytest.mark.slow
def test_files_of_the_last_step_are_left_out_of_a_plan_for_another(steps, capsys):
    """Curvature and statistics beside the history belong to its last weights."""
    model = load_model(steps / "last", dtype="float32")
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = [lambda: model(input_ids=ids, labels=ids).loss]
    files = PlanFiles.of(steps / "plan.json")
    curvature_of_losses(find_moe_layers(model), losses).save(files.curvature)
    collect_statistics(model, [{"input_ids": ids}]).save(files.statistics)
    command = ["plan", str(files.history), "--final", str(steps / "best"), "--group-size", "64"]
    assert main([*command, "-o", str(steps / "of_best.json")]) == 0
    assert capsys.readouterr().err.count("leaves out ") == 2
    assert PrecisionPlan.load(steps / "of_best.json").method == "router_norm"
    assert main(["quantize", str(steps / "best"), str(steps / "of_best.json"), str(steps / "out")]) == 0
    capsys.readouterr()
    assert main([*command, "--curvature", str(files.curvature), "-o", str(steps / "other.json")]) == 2
    assert "the curvature belongs to other weights" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_leaves_them_out_too(steps, tmp_path, capsys):
    text = "some words and some more\n" * 200
    (tmp_path / "text.txt").write_text(text)
    train_tokenizer([text], 300).save_pretrained(steps / "best")
    model = load_model(steps / "last", dtype="float32")
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    files = PlanFiles.of(steps / "plan.json")
    collect_statistics(model, [{"input_ids": ids}]).save(files.statistics)
    command = ["compare", str(steps / "best"), str(files.history), "--heldout", str(tmp_path / "text.txt")]
    command += ["--methods", "norm_only", "--group-size", "64", "--calibration-batches", "0"]
    assert main(command) == 0
    assert "leaves out " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_python_takes_the_same_files_beside_a_plan_as_the_command(steps):
    model = load_model(steps / "last", dtype="float32")
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    files = PlanFiles.of(steps / "plan.json")
    curvature_of_losses(find_moe_layers(model), [lambda: model(input_ids=ids, labels=ids).loss]).save(files.curvature)
    collect_statistics(model, [{"input_ids": ids}]).save(files.statistics)
    assert main(["quantize", str(steps / "last"), str(files.plan), str(steps / "command")]) == 0
    quantize_checkpoint(steps / "last", PrecisionPlan.load(files.plan), steps / "without")
    expected = load_model(steps / "command")(ids).logits
    config = PlanQuantizationConfig(files.plan)
    found = AutoModelForCausalLM.from_pretrained(steps / "last", quantization_config=config)
    assert torch.equal(found(ids).logits, expected)
    assert not torch.equal(load_model(steps / "without")(ids).logits, expected)


def test_two_families_are_no_training(tmp_path, capsys):
    """Their layers have the same names and shapes."""
    changes = {"intermediate_size": 64, "num_hidden_layers": 2}
    build("qwen3_moe", **changes).save_pretrained(tmp_path / "qwen")
    build("olmoe", **changes).save_pretrained(tmp_path / "olmoe")
    command = ["plan", "--initial", str(tmp_path / "qwen"), "--final", str(tmp_path / "olmoe")]
    assert main([*command, "--group-size", "64", "-o", str(tmp_path / "plan.json")]) == 2
    error = capsys.readouterr().err
    assert "of a model of type 'qwen3_moe', the trained model is 'olmoe'" in error
    assert not (tmp_path / "plan.json").exists()
