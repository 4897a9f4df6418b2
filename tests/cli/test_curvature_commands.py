"""Curvature on the command line: found beside a history or a plan, or made from gradients of a checkpoint."""

import copy

import pytest
import torch

from moe_precision import PrecisionPlan, RouterNormHistory, find_moe_layers, quantize_model
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.router_norms import router_norms
from moe_precision.recording.second_moments import curvature_of
from tests.support.models import build, logits
from tests.support.optimizers import trained_with


@pytest.mark.slow
def test_the_plan_command_finds_the_curvature_beside_the_history(tmp_path, capsys):
    model = build("mixtral")
    layers = find_moe_layers(model)
    history = RouterNormHistory.of(layers, "mixtral")
    history.record(0, router_norms(layers))
    optimizer = trained_with(torch.optim.AdamW, model)
    history.record(3, router_norms(layers))
    history.save(tmp_path / "x.history.safetensors")
    model.save_pretrained(tmp_path / "model")
    arguments = ["plan", str(tmp_path / "x.history.safetensors"), "--final", str(tmp_path / "model")]
    arguments += ["--method", "curvature", "--group-size", "64", "-o", str(tmp_path / "plan.json")]
    assert main(arguments) == 2
    assert "needs curvature" in capsys.readouterr().err
    curvature_of(layers, [optimizer]).save(tmp_path / "x.curvature.safetensors")
    assert main(arguments) == 0
    assert PrecisionPlan.load(tmp_path / "plan.json").method == "curvature"
    assert f"give quantize what this plan was made with: --curvature {tmp_path}" in capsys.readouterr().out
    alone = ["plan", str(tmp_path / "x.history.safetensors"), "--group-size", "64", "-o", str(tmp_path / "alone.json")]
    assert main(alone) == 0
    plan = PrecisionPlan.load(tmp_path / "alone.json")
    assert plan.method == "router_norm"
    assert plan.notes["auto"] == "without the trained weights, no width's cost can be measured"
    assert "give quantize" not in capsys.readouterr().out


@pytest.mark.slow
def test_plan_and_quantize_with_curvature(tmp_path, capsys):
    model = build("mixtral")
    optimizer = trained_with(torch.optim.AdamW, model)
    model.eval().save_pretrained(tmp_path / "model")
    curvature = curvature_of(find_moe_layers(model), [optimizer])
    curvature.save(tmp_path / "plan.curvature.safetensors")
    arguments = ["plan", str(tmp_path / "model"), "--method", "curvature", "--group-size", "64", "--stored-bits", "3"]
    arguments += ["--curvature", str(tmp_path / "plan.curvature.safetensors"), "--bits", "1", "2", "3", "4"]
    assert main([*arguments, "--granularity", "layer+projection", "-o", str(tmp_path / "plan.json")]) == 0
    plan = PrecisionPlan.load(tmp_path / "plan.json")
    assert plan.granularity in ("layer", "layer+projection")
    assert 2.5 < plan.stored_bits <= 3.0
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]) == 0
    assert "weights the fit by" in capsys.readouterr().out
    packed = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(packed), logits(quantize_model(copy.deepcopy(model), plan, curvature=curvature)))
    assert not torch.equal(logits(packed), logits(quantize_model(copy.deepcopy(model), plan)))


@pytest.mark.slow
@pytest.mark.usefixtures("model_with_text")
def test_the_plan_command_takes_gradients_of_a_checkpoint(tmp_path, capsys):
    arguments = ["plan", str(tmp_path / "model"), "--method", "curvature", "--curvature-batches", "2"]
    arguments += ["--dataset", str(tmp_path / "text.txt"), "--group-size", "64", "-o", str(tmp_path / "plan.json")]
    assert main(arguments) == 0
    found = Curvature.load(tmp_path / "plan.curvature.safetensors")
    assert all((of["down_proj"] > 0).any() for of in found.rows.values())
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]) == 0
    assert "plan.curvature.safetensors" in capsys.readouterr().out
    assert main([*arguments[:-1], str(tmp_path / "other.json"), "--curvature", "x.safetensors"]) == 2
    assert "give one" in capsys.readouterr().err
    # what is wrong with the plan is reported before gradients are taken, and nothing is replaced
    for wrong, message in (("--average-bits", "outside the levels"), ("--group-size", "does not divide")):
        bad = [*arguments[:-1], str(tmp_path / "bad.json"), wrong, "9" if wrong == "--average-bits" else "48"]
        assert main(bad) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bad.curvature.safetensors").exists()
    assert main([*arguments[:-1], str(tmp_path / "plan")]) == 2
    assert "expected the path of a plan, which ends in .json" in capsys.readouterr().err
    (tmp_path / "kept.curvature.safetensors").write_text("precious")
    assert main([*arguments[:-1], str(tmp_path / "kept.json")]) == 2
    assert (tmp_path / "kept.curvature.safetensors").read_text() == "precious"


@pytest.mark.slow
def test_every_file_that_is_not_beside_the_plan_is_named(tmp_path, capsys):
    model = build("mixtral")
    optimizer = trained_with(torch.optim.AdamW, model)
    model.eval().save_pretrained(tmp_path / "model")
    curvature_of(find_moe_layers(model), [optimizer]).save(tmp_path / "plan.curvature.safetensors")
    statistics = collect_statistics(model, [{"input_ids": torch.arange(3, 100)[None]}])
    statistics.save(tmp_path / "other.safetensors")
    arguments = ["plan", str(tmp_path / "model"), "--curvature", str(tmp_path / "plan.curvature.safetensors")]
    arguments += ["--statistics", str(tmp_path / "other.safetensors"), "--bits", "2", "3", "--group-size", "64"]
    assert main([*arguments, "-o", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert f"what this plan was made with: --statistics {tmp_path}" in printed
    assert "--curvature" not in printed
