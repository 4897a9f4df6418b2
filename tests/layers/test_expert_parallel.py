"""Experts split over processes as plain tensors: all processes record what one process with all experts records."""

import pytest
import torch

from moe_precision import MoELayerError, find_moe_layers
from moe_precision.quantize.replace import UnsupportedLayoutError, check_packable
from moe_precision.recording.collector import check_visible
from tests.support import expert_parallel_run
from tests.support.expert_parallel_run import EXPERTS, Layer, record
from tests.support.processes import finish, start


@pytest.mark.slow
def test_two_processes_record_what_one_records(tmp_path):
    logs = [tmp_path / f"{rank}.txt" for rank in (0, 1)]
    finish(*(start(expert_parallel_run.main, str(tmp_path), rank, log=logs[rank]) for rank in (0, 1)), logs=logs)
    expected = record(Layer())
    assert expected["loads"][0].sum() == 3 * 64 * 2
    assert len(set(expected["loads"][0].tolist())) > 3  # experts that cannot be taken for each other
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found.keys() == expected.keys()
        assert found.pop("bits") == expected["bits"]
        for name, values in found.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)


def test_half_of_the_experts_alone_is_an_error():
    with pytest.raises(MoELayerError, match=r"holds 3 of 6 experts, which are split over 2 processes .* but 1 run"):
        find_moe_layers(Layer(0, EXPERTS // 2))


def test_experts_that_are_all_here_are_as_ever():
    (layer,) = find_moe_layers(Layer())
    assert (layer.parts, layer.first_expert, layer.num_experts) == (1, 0, EXPERTS)
    check_visible([layer])


def test_packing_names_the_split(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    model = Layer(3, EXPERTS // 2)
    (layer,) = find_moe_layers(model)
    assert (layer.parts, layer.first_expert, layer.num_experts) == (2, 3, EXPERTS)
    with pytest.raises(UnsupportedLayoutError, match=r"split over 2 processes \(expert parallelism\); packing takes"):
        check_packable(model, [layer])
