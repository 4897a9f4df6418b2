"""Norms and variances read from safetensors alone are those of the loaded model, and so is the plan."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_precision import HistoryError, PrecisionPlan, RouterNormHistory, allocate, find_moe_layers
from moe_precision.allocation.costs import expert_costs
from moe_precision.allocation.weights import LiveWeights, StoredWeights
from moe_precision.checkpoints import Checkpoint, CheckpointError, StreamingError
from moe_precision.cli.main import main
from moe_precision.recording.router_norms import router_norms
from tests.support.model_zoo import build_tiny
from tests.support.models import build


def measured(model):
    return LiveWeights(model, {}).snapshot(variance=True)


def stored(folder):
    with Checkpoint(folder) as checkpoint:
        return StoredWeights(checkpoint).snapshot(variance=True)


LAYOUTS = {
    "mixtral": "one tensor per expert, w1 w2 w3, other module names",
    "deepseek_v3": "gate_proj, up_proj, down_proj",
    "gpt_oss": "fused, transposed, gate and up interleaved",
    "granitemoe": "fused, renamed",
    "dbrx": "flat banks",
    "switch_transformers": "one module per expert",
    "nemotron_h": "no gate",
    "longcat_flash": "null experts",
    "diffusion_gemma": "stored once for encoder and decoder",
    "dots3_note_vision_encoder": "another number of experts in each layer",
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"max_shard_size": "100KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_signals_are_those_of_the_model(family, sizes, tmp_path):
    model = build_tiny(family)
    model.save_pretrained(tmp_path, **sizes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(sizes)
    read, expected = stored(tmp_path), measured(model)
    assert read.layers == expected.layers
    for name in expected.layers:
        torch.testing.assert_close(read.router_norms[name], expected.router_norms[name])
        torch.testing.assert_close(read.max_variance[name], expected.max_variance[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYOUTS)
def test_costs_are_those_of_the_model(family, tmp_path):
    model = build_tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    group_size = 8
    expected = expert_costs(find_moe_layers(model), (2, 3), group_size)
    with Checkpoint(tmp_path) as checkpoint:
        found = StoredWeights(checkpoint).costs((2, 3), group_size, None)
    assert found.keys() == expected.keys()
    for name, projections in expected.items():
        assert found[name].keys() == projections.keys()
        for projection, costs in projections.items():
            torch.testing.assert_close(found[name][projection], costs, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_plan_by_cost_from_a_folder_is_that_of_the_model(tmp_path, monkeypatch):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "from_pretrained", None)  # no model is loaded
    plan = allocate(tmp_path, method="weight_error", group_size=64, bits=(1, 2, 3))
    assert plan.diff(allocate(model, method="weight_error", group_size=64, bits=(1, 2, 3))) == []


def test_module_names_on_disk(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    torch.testing.assert_close(stored(tmp_path).router_norms, measured(model).router_norms)


@pytest.fixture
def two_checkpoints(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    layers = find_moe_layers(model)
    before = RouterNormHistory.of(layers, "mixtral")
    before.record(0, router_norms(layers))
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.router_weight().mul_(torch.linspace(0.5, 2, 8)[torch.randperm(8)].unsqueeze(1))
    model.save_pretrained(tmp_path / "tuned")
    return model, before, tmp_path


def test_a_plan_from_two_checkpoints(two_checkpoints, capsys):
    model, before, folder = two_checkpoints
    expected = allocate(model, before, group_size=64)
    out = folder / "plan.json"
    arguments = ["--initial", str(folder / "base"), "--final", str(folder / "tuned"), "--group-size", "64"]
    assert main(["plan", *arguments, "-o", str(out)]) == 0
    plan = PrecisionPlan.load(out)
    assert plan.diff(expected) == []
    assert [layer.order for layer in plan.layers.values()] == [layer.order for layer in expected.layers.values()]
    assert plan.notes["initial"] == "base"
    assert plan.notes["final"] == "tuned"
    assert (plan.baseline_step, plan.last_step) == (0, None)
    assert str(folder) not in out.read_text()
    plan.check(model)


def test_a_history_and_the_final_checkpoint(two_checkpoints):
    model, before, folder = two_checkpoints
    before.save(folder / "run.history.safetensors")
    out = folder / "plan.json"
    arguments = ["plan", str(folder / "run.history.safetensors"), "--final", str(folder / "tuned")]
    assert main([*arguments, "--group-size", "64", "-o", str(out)]) == 0
    assert PrecisionPlan.load(out).diff(allocate(model, before, group_size=64)) == []


def test_without_initial_the_plan_and_the_terminal_say_what_it_rests_on(two_checkpoints, capsys):
    model, _, folder = two_checkpoints
    out = folder / "plan.json"
    with pytest.warns(UserWarning, match="as if all norms of a layer had been equal"):
        assert main(["plan", "--final", str(folder / "tuned"), "--group-size", "64", "-o", str(out)]) == 0
    norms = [layer.router_weight().detach().norm(dim=1) for layer in find_moe_layers(model)]
    spread = max(float((n.max() - n.min()) / n.mean()) for n in norms)
    plan = PrecisionPlan.load(out)
    assert plan.notes["spread_of_final_norms"]["largest"] == pytest.approx(spread, 1e-3)
    assert plan.to_dict()["baseline"] == "none"
    assert f"final norms spread up to {spread:.1%}" in capsys.readouterr().out.replace("\n", " ")


def damaged(change):
    def apply(folder):
        file = folder / "tuned" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


GATE = "model.layers.1.block_sparse_moe.gate.weight"


def drop_shard(folder):
    next((folder / "base").glob("model-00002-*")).unlink()


def truncate_shard(folder):
    file = next((folder / "base").glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "lacks the weight file 'model-00002-"),
        (truncate_shard, "model-00002-.* is truncated or damaged"),
        (
            damaged(lambda t: t[GATE][5].fill_(float("nan"))),
            r"expert 5 of layer 'model\.layers\.1\.mlp' has router norm nan",
        ),
        (damaged(lambda t: t[GATE][2].fill_(float("inf"))), "expert 2 of layer .* has router norm inf"),
        (damaged(lambda t: t.pop(GATE)), r"no tensor for 'model\.layers\.1\.mlp\.gate\.weight'"),
        (
            damaged(lambda t: t.update({GATE: torch.zeros(7, 64)})),
            r"has shape \(7, 64\), but its config.json says \(8, 64\)",
        ),
        (
            damaged(lambda t: t.pop("model.layers.0.block_sparse_moe.experts.3.w1.weight")),
            "has 7 of 8 experts for 'model.layers.0.mlp.experts.gate_up_proj'",
        ),
    ],
)
def test_damaged_checkpoints(damage, message, two_checkpoints, capsys):
    _, _, folder = two_checkpoints
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        allocate(folder / "tuned", folder / "base", group_size=64)
    arguments = ["--initial", str(folder / "base"), "--final", str(folder / "tuned"), "--group-size", "64"]
    assert main(["plan", *arguments, "-o", str(folder / "plan.json")]) == 2
    assert not (folder / "plan.json").exists()


def test_experts_of_another_shape(two_checkpoints):
    _, _, folder = two_checkpoints

    def cut(tensors):
        for name in [name for name in tensors if name.endswith(("w1.weight", "w3.weight"))]:
            tensors[name] = tensors[name][:64].clone()

    damaged(cut)(folder)
    with pytest.raises(CheckpointError, match=r"of expert 0 in layer .* has shape \(64, 64\), but .* says \(128, 64\)"):
        allocate(folder / "tuned", folder / "base", group_size=64)


def test_an_index_that_an_earlier_save_left(two_checkpoints):
    """save_pretrained in shards, then in one file: transformers reads the file, and so do we."""
    model, _, folder = two_checkpoints
    model.save_pretrained(folder / "base")
    (folder / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    torch.testing.assert_close(stored(folder / "base").router_norms, measured(model).router_norms)


def test_checkpoints_of_different_shapes(two_checkpoints):
    _, _, folder = two_checkpoints
    build("mixtral", num_local_experts=4).save_pretrained(folder / "other")
    with pytest.raises(HistoryError, match=r"of another model.*or their shapes differ"):
        allocate(folder / "tuned", folder / "other", group_size=64)


@pytest.mark.slow
def test_conversions_that_cannot_be_followed(tmp_path, capsys):
    """inkling2 stores gate and up interleaved: the error names it, and the command loads the model instead."""
    model = build_tiny("inkling2_text")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(StreamingError, match=r"gate_up_proj' is converted by \['Interleave'\]"):
        stored(tmp_path / "model")
    with pytest.warns(UserWarning, match="no baseline"):
        assert main(["plan", str(tmp_path / "model"), "--group-size", "8", "-o", str(tmp_path / "p.json")]) == 0
    assert "loading the whole model instead" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="no baseline"):
        assert PrecisionPlan.load(tmp_path / "p.json").diff(allocate(model, group_size=8)) == []


def test_a_quantized_checkpoint(two_checkpoints):
    _, _, folder = two_checkpoints
    config = json.loads((folder / "tuned" / "config.json").read_text())
    shutil.copytree(folder / "tuned", folder / "packed")
    config["quantization_config"] = {"quant_method": "moe_precision"}
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is quantized; give the float checkpoint"):
        stored(folder / "packed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a history, a checkpoint folder, or --final"),
        (["x.safetensors", "--initial", "base"], "--initial replaces the history"),
        (["--initial", "base"], "give a history, a checkpoint folder, or --final"),
        (["--final", "nowhere", "--router-pattern", "("], "router_pattern='('"),
        (["--final", "nowhere"], "no checkpoint folder at 'nowhere'"),
    ],
)
def test_bad_commands(arguments, message, capsys, tmp_path):
    assert main(["plan", *arguments, "-o", str(tmp_path / "p.json")]) == 2
    assert message in capsys.readouterr().err
