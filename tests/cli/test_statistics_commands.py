"""Expert statistics on the command line: collected from a dataset, kept, and found beside a plan."""

import os

import pytest
import torch

from moe_precision import PrecisionPlan, allocate, quantize_model
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.cli.main import main
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.quantize.codec.grid import Grid
from moe_precision.recording.collecting import memory_bytes
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.statistics import ExpertStatistics
from tests.support.models import logits

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(tmp_path, model_with_text):
    """A model with its tokenizer, a plan, and a text."""
    plan = allocate(model_with_text, method="uniform", average_bits=2, group_size=64)
    plan.save(tmp_path / "plan.json")
    return model_with_text, plan


def test_a_checkpoint_that_nobody_watched(saved, tmp_path, capsys):
    model, plan = saved
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), "--non-expert-bits", "8"]
    command.append(str(tmp_path / "out"))
    collecting = ["--statistics-batches", "2", "--dataset", str(tmp_path / "text.txt")]
    kept = tmp_path / "plan.statistics.safetensors"
    assert main([*command, *collecting, "--save-statistics", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "collects statistics from 2 training batches of" in printed
    assert "MB beside the float model" in printed
    assert "tokens per expert: least" in printed
    assert "; inputs of 8 other linear layers" in printed
    statistics = ExpertStatistics.load(kept)
    assert statistics.text == f"2 training batches of {tmp_path / 'text.txt'}"
    assert all(tokens.sum() > 0 for tokens in statistics.tokens.values())
    packed = logits(load_model(tmp_path / "out", dtype="float32"))

    assert main([*command[:-1], str(tmp_path / "again")]) == 0  # the file is beside the plan now
    assert f"rounds under the statistics of {kept} (from 2 training batches" in capsys.readouterr().out
    assert torch.equal(logits(load_model(tmp_path / "again", dtype="float32")), packed)
    torch.testing.assert_close(packed, logits(quantize_model(model, plan, non_expert_bits=8, statistics=kept)))


def test_within_a_bound_on_memory(saved, tmp_path, capsys):
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    collecting = ["--statistics-batches", "2", "--dataset", str(tmp_path / "text.txt")]
    bound = 1.5 * memory_bytes(find_moe_layers(saved[0])[:1]) / 2**30
    assert main([*command, *collecting, "--statistics-memory", str(bound)]) == 0
    assert "MB afterwards, in 2 passes over the text" in capsys.readouterr().out
    assert main([*command, *collecting, "--statistics-memory", str(bound / 2)]) == 2
    assert "more than the" in capsys.readouterr().err


def test_statistics_can_be_left_out(saved, tmp_path, capsys):
    model, plan = saved
    (tmp_path / "plan.statistics.safetensors").write_bytes(b"")
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main(command) == 2
    assert "plan.statistics.safetensors" in capsys.readouterr().err
    assert main([*command, "--statistics", "none"]) == 0
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out", dtype="float32")), logits(quantize_model(model, plan))
    )


def test_a_grid_wins_over_statistics(saved, tmp_path, capsys):
    model, plan = saved
    Grid.fit(find_moe_layers(model), plan).save(tmp_path / "plan.grid.safetensors")
    (tmp_path / "plan.statistics.safetensors").write_bytes(b"")
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    main(command)
    assert "statistics are not used: codes and scales are those of the grid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--statistics", "x.safetensors", "--statistics-batches", "2"], "two sources of one thing"),
        (["--save-statistics", "x.safetensors"], "give that too"),
        (["--distill-steps", "2", "--backend", "auto-round"], "cannot be used with --backend auto-round"),
        (["--statistics", "nowhere.safetensors"], "no statistics at 'nowhere.safetensors'"),
        (["--statistics-batches", "2", "--backend", "auto-round"], "cannot be used with --backend auto-round"),
    ],
)
def test_options_that_do_not_go_together(saved, tmp_path, capsys, options, message):
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_plan_by_statistics_of_a_checkpoint_and_scales_distilled(tmp_path, model_with_text, capsys):
    dataset, plan = ["--dataset", str(tmp_path / "text.txt")], str(tmp_path / "plan.json")
    batches = ["--curvature-batches", "2", "--statistics-batches", "2"]
    assert main(["plan", str(tmp_path / "model"), *batches, *dataset, "--group-size", "64", "-o", plan]) == 0
    printed = capsys.readouterr().out
    assert "plan.statistics.safetensors (tokens per expert: least" in printed
    assert "method statistics (there are curvature and expert statistics)" in printed.replace("\n", " ")
    made = PrecisionPlan.load(plan)
    curvature = Curvature.load(tmp_path / "plan.curvature.safetensors")
    expected = allocate(
        tmp_path / "model", curvature=curvature, statistics=tmp_path / "plan.statistics.safetensors", group_size=64
    )
    assert made.notes["calibration_tokens"] > 0
    assert made.notes["final"] == "model"
    for name, layer in made.layers.items():  # calibrated: in the same proportions, layer by layer
        for projection, by in layer.costs.items():
            for bits, found in by.items():
                plain = torch.tensor(expected.layers[name].costs[projection][bits])
                found = torch.tensor(found)
                torch.testing.assert_close(found / found.sum(), plain / plain.sum(), rtol=2e-3, atol=0)
    folders = [str(tmp_path / name) for name in ("model", "plain", "distilled")]
    assert main(["quantize", folders[0], plan, folders[1]]) == 0
    assert main(["quantize", folders[0], plan, folders[2], "--distill-steps", "4", *dataset]) == 0
    printed = capsys.readouterr().out
    assert "distilled scales over 4 training batches of" in printed
    assert "error of the layers' output: 0." in printed
    plain, distilled = (load_model(folder) for folder in folders[1:])
    assert not torch.equal(logits(plain), logits(distilled))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    again = ["plan", str(tmp_path / "model"), "--statistics", "x.safetensors", *batches, "-o", f"{plan[:-5]}2.json"]
    assert main(again) == 2
    assert "--statistics and --statistics-batches are two sources of one thing" in capsys.readouterr().err


def test_a_grid_is_not_distilled(saved, tmp_path, capsys):
    model, plan = saved
    Grid.fit(find_moe_layers(model), plan).save(tmp_path / "plan.grid.safetensors")
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main([*command, "--distill-steps", "2"]) == 2
    assert "would change the scales of" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--distill-steps", "2"]])
def test_what_is_read_is_not_replaced(saved, tmp_path, capsys, options):
    """The plan and the files beside it lie in a folder that was packed before."""
    out = tmp_path / "out"
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(out)]) == 0
    plan = (tmp_path / "plan.json").rename(out / "plan.json")
    assert main(["quantize", str(tmp_path / "model"), str(plan), str(out), *options]) == 2
    assert "would be replaced, and" in capsys.readouterr().err
    assert plan.is_file()


def test_text_to_distill_on_is_looked_for_before_packing(saved, tmp_path, capsys):
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    assert main([*command, "--distill-steps", "2", "--dataset", str(tmp_path / "nothing.txt")]) != 0
    printed = capsys.readouterr()
    assert "no curvature file" in printed.out
    assert "Quantizing" not in printed.err


def test_dropping_is_refused_before_any_batch_runs(saved, tmp_path, capsys):
    command = ["plan", str(tmp_path / "model"), "--bits", "0", "1", "2", "--average-bits", "1"]
    assert main([*command, "--curvature-batches", "1000000", "-o", str(tmp_path / "dropping.json")]) == 2
    message = "0 bits drop an expert, which needs curvature and statistics: give --statistics or --statistics-batches"
    assert message in capsys.readouterr().err
