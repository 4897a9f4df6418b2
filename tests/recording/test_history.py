"""The history: what it records, that it survives a checkpoint and a file, and what it refuses."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from moe_precision import AllocationError, HistoryError, RouterNormHistory, allocate
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build


@pytest.fixture
def history(mixtral):
    layers = find_moe_layers(mixtral)
    history = RouterNormHistory.of(layers, "mixtral")
    for step in (0, 4, 9):
        history.record(step, torch.arange(16.0) * (step + 1))
    history.measure_variance(layers)
    return history


def test_one_transfer_a_record(mixtral):
    """All layers together: the only call that moves a value off the device is one ``to("cpu")``."""

    class Transfers(TorchFunctionMode):
        moving = frozenset({"to", "cpu", "item", "tolist", "numpy", "__float__", "__bool__", "__int__", "__index__"})

        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in self.moving:
                self.calls.append((func.__name__, tuple(args[0].shape)))
            return func(*args, **(kwargs or {}))

    layers = find_moe_layers(mixtral)
    history = RouterNormHistory.of(layers, "mixtral")
    with Transfers() as transfers:
        history.record(0, router_norms(layers))
    assert transfers.calls == [("to", (16,))]


def test_records(history):
    assert history.baseline_step == 0
    assert history.steps == [0, 4, 9]
    assert history.norms["model.layers.1.mlp"].shape == (3, 8)
    assert history.change("model.layers.1.mlp").tolist() == [9.0 * e for e in range(8, 16)]


def test_metrics(history):
    metrics = history.metrics()
    assert metrics["router_norm/layer_01/expert_007"] == 150.0
    assert metrics["router_norm/layer_00/min"] == 0.0
    assert metrics["router_norm/layer_00/median"] == 30.0  # of 0, 10, .. 70: the lower of the middle two
    assert metrics["router_norm_change/layer_01/max"] == 135.0
    assert len(metrics) == 2 * (8 + 6)


def test_state_survives_a_safe_load(history, tmp_path):
    torch.save(history.state_dict(), tmp_path / "state.pt")
    restored = RouterNormHistory()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(restored, history)


def assert_equal(one, other):
    for key in ("layers", "steps", "model_type", "caveats", "patterns", "dtypes"):
        assert getattr(one, key) == getattr(other, key)
    for key in ("norms", "max_variance", "loads"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key), rtol=0, atol=0)


def test_steps_rise(history):
    with pytest.raises(HistoryError, match="step 9 is not after the last recorded step 9"):
        history.record(9, torch.zeros(16))


def test_diverged_training_makes_no_plan(history):
    history.record(10, torch.full((16,), float("inf")))  # recording never stops a run
    history.record(12, torch.full((16,), float("nan")))
    with pytest.raises(
        AllocationError, match=r"expert 0 of layer 'model\.layers\.0\.mlp' has router norm inf at step 10"
    ):
        allocate(history=history, group_size=64)


def test_a_new_record_forgets_the_variances_of_an_earlier_step(history):
    assert history.max_variance
    history.record(20, torch.ones(16))
    assert not history.max_variance
    history.measure_variance(find_moe_layers(build("mixtral")))
    assert not history.replace_last(torch.ones(16))
    assert history.replace_last(torch.full((16,), 2.0))
    assert history.last["model.layers.0.mlp"].tolist() == [2.0] * 8
    assert not history.max_variance


# -- its file ----------------------------------------------------------------------------------------------------------


def test_file(history, tmp_path):
    path = tmp_path / "h.safetensors"
    history.loads = {"training": {name: torch.rand(2, 8).double() for name in history.layers}}
    history.patterns = {"router_pattern": "gate"}
    history.save(path)
    assert_equal(RouterNormHistory.load(path), history)
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]
    layers = ["model.layers.0.mlp", "model.layers.1.mlp"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kinds = ("norms", "max_variance", "loads/training")
        assert set(file.keys()) == {"steps"} | {f"{kind}/{layer}" for kind in kinds for layer in layers}
    assert metadata.pop("format") == "moe-precision-history"
    assert metadata.pop("model_type") == "mixtral"  # as it is, all below is JSON
    assert {key: json.loads(value) for key, value in metadata.items()} == {
        "version": 1,
        "layers": {name: layer.to_dict() for name, layer in history.layers.items()},
        "caveats": {},
        "patterns": {"router_pattern": "gate"},
        "dtypes": ["float32"],
    }


def test_a_history_without_records_can_be_kept(mixtral, tmp_path):
    RouterNormHistory.of(find_moe_layers(mixtral), "mixtral").save(tmp_path / "h.safetensors")
    again = RouterNormHistory.load(tmp_path / "h.safetensors")
    assert again.steps == []
    assert again.norms["model.layers.1.mlp"].shape == (0, 8)


SHAPE = {"router": "a.gate.weight", "num_experts": 2, "projections": {"wi": [8, 4], "wo": [4, 8]}}


def written(path, norms=((1.0, 2.0), (3.0, 4.0)), layers=None):
    """An early file of version 1, which had neither caveats nor patterns nor dtypes."""
    metadata = {"format": "moe-precision-history", "version": "1", "model_type": "x"}
    metadata["layers"] = json.dumps({"a": SHAPE} if layers is None else layers)
    save_file({"steps": torch.tensor([0, 7]), "norms/a": torch.tensor(norms)}, path, metadata=metadata)
    return path


def test_an_early_file(tmp_path):
    history = RouterNormHistory.load(written(tmp_path / "h.safetensors"))
    assert history.steps == [0, 7]
    assert history.change("a").tolist() == [2.0, 2.0]
    assert history.layers["a"].projections == {"wi": (8, 4), "wo": (4, 8)}
    assert (history.caveats, history.patterns, history.dtypes, history.loads) == ({}, {}, [], {})


@pytest.mark.parametrize(
    ("norms", "layers", "message"),
    [
        ([[1.0, 2.0]], None, r"tensor 'norms/a' has shape \(1, 2\), expected \(2, 2\)"),
        ([[1.0, 2.0]] * 2, {"a": {}}, "'layers' in its metadata describes no layers"),
        ([[1.0, 2.0]] * 2, {}, "'layers' in its metadata is empty"),
        ([[1.0, 2.0]] * 2, {"a": SHAPE, "b": SHAPE}, "it has no tensor 'norms/b'"),
    ],
)
def test_a_file_whose_parts_do_not_fit(norms, layers, message, tmp_path):
    with pytest.raises(HistoryError, match=f"not an intact router-norm history file: {message}"):
        RouterNormHistory.load(written(tmp_path / "h.safetensors", norms, layers))


def test_a_checkpoint_of_another_version(history):
    state = {**history.state_dict(), "version": 2}
    with pytest.raises(HistoryError, match="of version 2, this release reads version 1"):
        RouterNormHistory().load_state_dict(state)
