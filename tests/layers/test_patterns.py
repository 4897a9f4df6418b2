"""Routers and experts that regular expressions name, where structure cannot."""

import pytest
import torch
from torch import nn

from moe_precision import MoELayerError, find_moe_layers
from tests.support.models import PlainMoE
from tests.support.modules import Holder, bank, linears


class Grouped(nn.Module):
    """Megatron's grouped linear: one weight per expert, all in one module."""

    def __init__(self, experts, out, inp):
        super().__init__()
        for expert in range(experts):
            self.register_parameter(f"weight{expert}", nn.Parameter(torch.randn(out, inp)))


def megatron(layers=2, experts=12):
    def layer():
        grouped = Holder(linear_fc1=Grouped(experts, 64, 16), linear_fc2=Grouped(experts, 16, 32))
        return Holder(mlp=Holder(router=Holder(weight=bank(experts, 16)), experts=grouped))

    return Holder(decoder=Holder(layers=nn.ModuleList(layer() for _ in range(layers))))


def test_patterns_name_weights_that_structure_cannot_tell():
    model = megatron()
    with pytest.raises(MoELayerError, match="name them with expert_pattern"):
        find_moe_layers(model)
    layers = find_moe_layers(model, expert_pattern=r"experts\.linear_fc[12]\.weight(?P<expert>\d+)$")
    assert [layer.name for layer in layers] == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
    assert layers[1].router == "decoder.layers.1.mlp.router.weight"
    assert layers[1].projections == {"linear_fc1": (64, 16), "linear_fc2": (16, 32)}
    for expert in (2, 11):
        own = model.get_parameter(f"decoder.layers.1.mlp.experts.linear_fc2.weight{expert}")
        torch.testing.assert_close(layers[1].expert_weights(expert)["linear_fc2"], own)


def test_patterns_for_flat_banks():
    """MegaBlocks: all experts one below the other, without a number of experts; w2 is stored (in, out)."""
    banks = Holder(w1=bank(4 * 32, 16), w2=bank(4 * 32, 16))
    model = Holder(ffn=Holder(router=Holder(layer=nn.Linear(16, 4, bias=False)), experts=Holder(mlp=banks)))
    (layer,) = find_moe_layers(model, expert_pattern=r"experts\.mlp\.w[12]", router_pattern=r"router\.layer\.weight")
    assert (layer.name, layer.num_experts) == ("ffn", 4)
    assert layer.projections == {"w1": (32, 16), "w2": (16, 32)}
    torch.testing.assert_close(layer.expert_weights(3)["w2"], banks.w2[96:].T)
    with pytest.raises(MoELayerError, match="give router_pattern"):
        find_moe_layers(model, expert_pattern=r"experts\.mlp\.w[12]")


def test_a_router_pattern_chooses():
    model = PlainMoE()
    model.gate = nn.Linear(32, 4, bias=False)
    assert find_moe_layers(model, router_pattern=r"^gate\.weight")[0].router_weight() is model.gate.weight
    two = nn.Sequential(PlainMoE(), PlainMoE())
    found = find_moe_layers(two, router_pattern=r"router")
    assert [layer.router for layer in found] == ["0.router.weight", "1.router.weight"]
    columns = Holder(w_gate=bank(16, 8), experts=linears(8))  # a router with one column per expert
    (layer,) = find_moe_layers(columns, router_pattern="w_gate")
    torch.testing.assert_close(layer.router_weight(), columns.w_gate.T)
    null = Holder(w_gate=bank(16, 10), experts=linears(8))  # and columns of two null experts
    (layer,) = find_moe_layers(null, router_pattern="w_gate")
    torch.testing.assert_close(layer.row_norms(), null.w_gate[:, :8].norm(dim=0))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"router_pattern": "nothing"}, r"router_pattern='nothing' matches no matrix; the model has .*router\.weight"),
        ({"expert_pattern": "nothing"}, r"expert_pattern='nothing' matches no matrix; the model has"),
        ({"expert_pattern": r"experts\.(?P<expert>[13])\.0"}, "expected experts 0, 1, ..."),
        ({"router_pattern": r"experts\.0\..*weight"}, "is a part of experts, or beside other ones"),
    ],
)
def test_patterns_that_do_not_fit(patterns, message):
    with pytest.raises(MoELayerError, match=message):
        find_moe_layers(PlainMoE(), **patterns)


def test_flat_banks_with_a_transposed_router():
    banks = Holder(w1=bank(8 * 64, 32), w2=bank(8 * 64, 32))
    patterns = {"router_pattern": "router", "expert_pattern": r"experts\.w[12]"}
    (layer,) = find_moe_layers(Holder(router=bank(32, 8), experts=banks), **patterns)
    assert (layer.num_experts, layer.projections) == (8, {"w1": (64, 32), "w2": (32, 64)})
    with pytest.raises(MoELayerError, match=r"has shape \(8, 16\), expected \(experts, 32\)"):
        find_moe_layers(Holder(router=bank(8, 16), experts=banks), **patterns)


def test_a_pattern_that_matches_some_layers_skips_none():
    with pytest.raises(MoELayerError, match=r"experts at '1\.experts' are not matched by expert_pattern"):
        find_moe_layers(nn.Sequential(PlainMoE(), PlainMoE()), expert_pattern=r"^0\.experts\.(?P<expert>\d+)\.")
    model = megatron(layers=3)
    with pytest.raises(MoELayerError, match=r"'decoder\.layers\.2\.mlp\.experts' .* not understood"):
        find_moe_layers(model, expert_pattern=r"layers\.[01]\.mlp\.experts\.linear_fc[12]\.weight(?P<expert>\d+)$")


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(MoELayerError, match=r"router_pattern='\(' is not a regular expression"):
        find_moe_layers(PlainMoE(), router_pattern="(")


@pytest.mark.parametrize("router", [{}, {"router_pattern": r"router\.weight"}])
def test_a_pattern_of_modules_without_their_index_says_how_to_mark_it(router):
    """Without the group each expert looks like a flat bank of all of them."""
    with pytest.raises(MoELayerError, match=r"matrices of one expert.*\(\?P<expert>\\d\+\)"):
        find_moe_layers(PlainMoE(), expert_pattern=r"experts\.\d+\.\d+\.weight", **router)
    (layer,) = find_moe_layers(PlainMoE(), expert_pattern=r"experts\.(?P<expert>\d+)\.\d+\.weight", **router)
    assert layer.num_experts == 4
