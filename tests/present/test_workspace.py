"""The saved view of a Weights & Biases project; nothing is sent here."""

import re

import pytest
import torch

from moe_precision import RouterNormHistory
from moe_precision.cli.main import main
from moe_precision.layers.shape import LayerShape
from moe_precision.present.workspace import WorkspaceError, layout_of, save, workspace_of


@pytest.fixture
def history():
    history = RouterNormHistory({f"layers.{at}": LayerShape(f"gate.{at}", 2, {"up": (8, 8)}) for at in range(2)}, "x")
    for step in (0, 10):
        history.record(step, torch.ones(4) * step)
    return history


@pytest.mark.slow
def test_the_view_matches_what_is_logged(history):
    pytest.importorskip("wandb_workspaces", reason="not installed: pip install -e .[workspace]")
    workspace = workspace_of(list(history.layers), "team", "moe", trainer="transformers")
    plan, norms, load = workspace.sections
    assert [panel.title for panel in norms.panels] == ["layers.0", "layers.1"]
    logged = [*history.metrics(), "expert_load/layer_01/min"]
    found = [[key for key in logged if re.fullmatch(panel.metric_regex, key)] for panel in norms.panels]
    assert found == [[f"router_norm/layer_{at:02d}/expert_{expert:03d}" for expert in (0, 1)] for at in (0, 1)]
    assert [key for key in logged if re.fullmatch(load.panels[0].metric_regex, key)] == ["expert_load/layer_01/min"]
    medians = [key for key in logged if re.fullmatch(plan.panels[1].metric_regex, key)]
    assert medians == [f"router_norm_change/layer_{at:02d}/median" for at in (0, 1)]
    sent = workspace._to_model().model_dump_json(by_alias=True)  # the spec, as W&B gets it
    assert sent.count('"xAxis":"train/global_step"') == 2 + 2 + 2
    assert '"mediaKeys":["router_norm_change/heatmap"]' in sent
    assert '"metrics":["summary_metrics.precision_plan/average_bits"]' in sent


def test_the_layout_of_tensorboard_matches_what_is_logged(history, tmp_path, capsys):
    logged = [*history.metrics(), "plan/changed", "expert_load/layer_01/min", "expert_load/layer_01/max"]
    charts = [chart for category in layout_of(list(history.layers)).values() for chart in category.items()]
    found = {title: [key for key in logged if re.fullmatch(regex, key)] for title, (kind, (regex,)) in charts}
    assert all(found.values())
    assert found["layers.1"] == ["router_norm/layer_01/expert_000", "router_norm/layer_01/expert_001"]
    history.save(tmp_path / "precision_plan.history.safetensors")
    assert main(["workspace", str(tmp_path), "--tensorboard", str(tmp_path)]) == 2
    assert "holds no event file; give the folder of one run" in capsys.readouterr().err
    assert main(["workspace", str(tmp_path)]) == 2
    assert "give ENTITY/PROJECT for Weights & Biases, or --tensorboard FOLDER" in capsys.readouterr().err


def test_a_view_that_cannot_be_saved_says_what_to_do():
    class Offline:
        entity, project = "team", "moe"

        def save(self):
            raise ConnectionError("no network")

    with pytest.raises(WorkspaceError, match=r"in team/moe: ConnectionError: no network. Does `wandb login"):
        save(Offline())


def test_the_command(history, tmp_path, monkeypatch, capsys):
    history.save(tmp_path / "precision_plan.history.safetensors")
    assert main(["workspace", str(tmp_path), "moe"]) == 2
    assert "got 'moe', expected ENTITY/PROJECT" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    assert main(["workspace", str(tmp_path), "team/moe"]) == 2
    assert "pip install 'moe-precision[workspace]'" in capsys.readouterr().err
