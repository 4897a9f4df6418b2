"""The history: what it records, that it survives a checkpoint and a file, and what it refuses."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_precision import AllocationError, HistoryError, MoELayerError, RouterNormHistory, allocate
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recording.router_norms import router_norms
from tests.support.models import build


def test_norms_are_of_rows_in_float32():
    model = build("mixtral").to(torch.bfloat16)
    layers = find_moe_layers(model)
    norms = router_norms(layers)
    assert norms.dtype == torch.float32
    rows = [model.get_parameter(layer.router).float().square().sum(1).sqrt() for layer in layers]
    torch.testing.assert_close(norms, torch.cat(rows))


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


def test_rows_beyond_the_experts_are_left_out(mixtral):
    gate = mixtral.get_submodule("model.layers.0.mlp.gate")
    gate.weight = nn.Parameter(torch.cat([gate.weight, torch.full((1, 64), 9.0)]))  # a null expert's row
    layers = find_moe_layers(mixtral)
    assert router_norms(layers).shape == (16,)
    assert router_norms(layers).max() < 9


def test_a_flat_shard_is_an_error_and_never_a_wrong_norm(mixtral):
    layers = find_moe_layers(mixtral)
    mixtral.get_submodule("model.layers.0.mlp.gate").weight = nn.Parameter(torch.randn(256))
    with pytest.raises(MoELayerError, match=r"shape \(256,\) on this rank, expected \(8, 64\): it is a shard"):
        router_norms(layers)


@pytest.fixture
def history(mixtral):
    layers = find_moe_layers(mixtral)
    history = RouterNormHistory.of(layers, "mixtral")
    for step in (0, 4, 9):
        history.record(step, torch.arange(16.0) * (step + 1))
    history.measure_variance(layers)
    return history


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


def test_file(history, tmp_path):
    history.save(tmp_path / "h.safetensors")
    assert_equal(RouterNormHistory.load(tmp_path / "h.safetensors"), history)
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]


def assert_equal(one, other):
    assert one.layers == other.layers
    assert one.steps == other.steps
    assert one.model_type == other.model_type
    for name in one.layers:
        assert torch.equal(one.norms[name], other.norms[name])
        assert torch.equal(one.max_variance[name], other.max_variance[name])


def test_steps_rise(history):
    with pytest.raises(HistoryError, match="step 9 is not after the last recorded step 9"):
        history.record(9, torch.zeros(16))


def test_diverged_training_makes_no_plan(history):
    history.record(10, torch.full((16,), float("inf")))  # watching never stops a run
    history.record(12, torch.full((16,), float("nan")))
    with pytest.raises(
        AllocationError, match=r"expert 0 of layer 'model\.layers\.0\.mlp' has router norm inf at step 10"
    ):
        allocate(history=history, group_size=64)


def test_truncated_file(history, tmp_path):
    path = tmp_path / "h.safetensors"
    history.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(HistoryError, match="no whole safetensors file"):
        RouterNormHistory.load(path)


def test_another_safetensors_file(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(HistoryError, match="no moe-precision-history"):
        RouterNormHistory.load(tmp_path / "x.safetensors")
    metadata = {"format": "moe-precision-history", "version": "1", "model_type": "x", "layers": '{"a": {}}'}
    save_file({"steps": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(HistoryError, match="lacks part of a history"):
        RouterNormHistory.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="no router-norm history"):
        RouterNormHistory.load(tmp_path / "missing.safetensors")


def test_a_new_record_forgets_the_variances_of_an_earlier_step(history):
    assert history.max_variance
    history.record(20, torch.ones(16))
    assert not history.max_variance
    history.measure_variance(find_moe_layers(build("mixtral")))
    assert not history.replace_last(torch.ones(16))
    assert history.replace_last(torch.full((16,), 2.0))
    assert history.last["model.layers.0.mlp"].tolist() == [2.0] * 8
    assert not history.max_variance
