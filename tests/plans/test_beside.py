"""Names of the files beside a plan."""

from pathlib import Path

import pytest

from moe_precision.plans.beside import PlanFiles, existing


@pytest.mark.parametrize(
    "name",
    [
        "x.json",
        "x.history.safetensors",
        "x.curvature.safetensors",
        "x.statistics.safetensors",
        "x.grid.safetensors",
        "x.teacher.safetensors",
    ],
)
def test_any_of_the_files_names_all_of_them(name):
    files = PlanFiles.of(f"runs/{name}")
    assert files.plan == Path("runs/x.json")
    assert files.history == Path("runs/x.history.safetensors")
    assert files.curvature == Path("runs/x.curvature.safetensors")
    assert files.statistics == Path("runs/x.statistics.safetensors")
    assert files.grid == Path("runs/x.grid.safetensors")
    assert files.teacher == Path("runs/x.teacher.safetensors")
    assert files.all == (files.plan, files.history, files.curvature, files.statistics, files.grid, files.teacher)


def test_a_name_with_dots_stays_whole():
    assert PlanFiles.of(Path("plan.v2.json")).grid == Path("plan.v2.grid.safetensors")
    assert PlanFiles.of("plan.v2.grid.safetensors").plan == Path("plan.v2.json")


@pytest.mark.parametrize("path", ["plan", "plan.txt", "plan.safetensors", ".history.safetensors", "runs/", ".json"])
def test_a_path_of_no_plan(path):
    with pytest.raises(ValueError, match=r"expected the path of a plan, which ends in \.json"):
        PlanFiles.of(path)
    with pytest.raises(ValueError, match=r"expected the path of a plan, which ends in \.json"):
        PlanFiles(Path(path))


def test_what_exists(tmp_path):
    plan = tmp_path / "x.json"
    assert existing("curvature", plan) is None
    PlanFiles.of(plan).curvature.touch()
    assert existing("curvature", plan) == tmp_path / "x.curvature.safetensors"
    assert existing("curvature", str(tmp_path / "x.history.safetensors")) == tmp_path / "x.curvature.safetensors"
    assert existing("grid", plan) is None
    assert existing("curvature", tmp_path / "norms.safetensors") is None  # a history under a name of its own
    with pytest.raises(ValueError, match=r"expected the path of a plan, which ends in \.json"):
        existing("grid", tmp_path / "x")  # else the grid beside it would be passed over in silence
    assert existing("curvature", None) is None
