"""Router norms of live layers: of the right rows, in float32, never of a shard; weights are recognized by them."""

import pytest
import torch
from torch import nn

from moe_precision import MoELayerError
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.recording.router_norms import check_same_weights, norms_by_layer, router_norms
from tests.support.models import build


def test_norms_are_of_rows_in_float32():
    model = build("mixtral").to(torch.bfloat16)
    layers = find_moe_layers(model)
    norms = router_norms(layers)
    assert norms.dtype == torch.float32
    rows = [model.get_parameter(layer.router).float().square().sum(1).sqrt() for layer in layers]
    torch.testing.assert_close(norms, torch.cat(rows))


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


def test_the_same_weights_in_another_dtype_and_other_weights(mixtral):
    before = norms_by_layer(find_moe_layers(mixtral))
    rounded = norms_by_layer(find_moe_layers(mixtral.bfloat16()))
    assert not torch.equal(rounded["model.layers.1.mlp"], before["model.layers.1.mlp"])
    check_same_weights(before, rounded, "grid", MemoryError)
    rounded["model.layers.1.mlp"][3] *= 1.05
    with pytest.raises(MemoryError, match=r"the grid belongs to other weights: .* 'model\.layers\.1\.mlp' .* up to 5"):
        check_same_weights(before, rounded, "grid", MemoryError)
