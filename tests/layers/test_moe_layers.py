"""Routers and experts are found by structure, with the right names, counts and shapes."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_precision.layers.module_tree import MoELayerError, root_model
from moe_precision.layers.moe_layers import find_moe_layers
from tests.support.model_zoo import build_tiny
from tests.support.models import DECODER, PlainMoE, build
from tests.support.modules import Holder, bank, linears

# family -> layers, first layer's name, router below it, projections
EXPECTED = {
    "mixtral": (2, "model.layers.0.mlp", "gate.weight", {"gate_up_proj": (256, 64), "down_proj": (64, 128)}),
    "qwen2_moe": (2, "model.layers.0.mlp", "gate.weight", {"gate_up_proj": (64, 64), "down_proj": (64, 32)}),
    "qwen3_moe": (2, "model.layers.0.mlp", "gate.weight", {"gate_up_proj": (128, 64), "down_proj": (64, 64)}),
    "olmoe": (2, "model.layers.0.mlp", "gate.weight", {"gate_up_proj": (256, 64), "down_proj": (64, 128)}),
    "deepseek_v3": (2, "model.layers.1.mlp", "gate.weight", {"gate_up_proj": (64, 64), "down_proj": (64, 32)}),
    "gpt_oss": (2, "model.layers.0.mlp", "router.weight", {"gate_up_proj": (256, 64), "down_proj": (64, 128)}),
    "switch_transformers": (
        2,
        "encoder.block.1.layer.1.mlp",
        "router.classifier.weight",
        {"wi": (128, 64), "wo": (64, 128)},
    ),
    "nllb-moe": (
        2,
        "model.encoder.layers.1.ffn",
        "router.classifier.weight",
        {"fc1": (128, 64), "fc2": (64, 128)},
    ),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_families(family):
    count, name, router, projections = EXPECTED[family]
    model = build(family)
    layers = find_moe_layers(model)
    assert len(layers) == count
    first = layers[0]
    assert first.name == name
    assert first.router == f"{name}.{router}"
    assert first.num_experts == 8
    assert first.projections == projections
    assert first.router_weight() is model.get_parameter(first.router)
    for layer in layers:
        for expert in range(8):
            assert {n: tuple(w.shape) for n, w in layer.expert_weights(expert).items()} == projections


def test_weights_are_the_models_own():
    model = build("gpt_oss")  # holds (E, in, out), gate and up rows interleaved
    layer = find_moe_layers(model)[0]
    bank = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    torch.testing.assert_close(layer.expert_weights(3)["gate_up_proj"], bank[3].T)
    torch.testing.assert_close(layer.first_projection(3), bank[3].T[0::2])
    mixtral = build("mixtral")
    layer = find_moe_layers(mixtral)[1]
    bank = mixtral.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    torch.testing.assert_close(layer.first_projection(5), bank[5, :128])
    switch = build("switch_transformers")
    layer = find_moe_layers(switch)[0]
    assert layer.first_projection(2) is not None
    own = switch.get_parameter("encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight")
    torch.testing.assert_close(layer.first_projection(2), own)


def test_a_users_own_moe():
    layers = find_moe_layers(nn.Sequential(PlainMoE(), nn.Linear(32, 32), PlainMoE()))
    assert [(layer.name, layer.router, layer.experts) for layer in layers] == [
        ("0", "0.router.weight", "0.experts"),
        ("2", "2.router.weight", "2.experts"),
    ]
    assert layers[0].projections == {"0": (64, 32), "2": (32, 64)}


def test_a_stack_of_layers_is_not_a_list_of_experts():
    """As many equal layers as experts, so that the stack itself looks like experts with a router in each."""

    class Wrapper(nn.Module):
        def __init__(self, stack):
            super().__init__()
            self.moe_stack = stack

    for stack in (nn.Sequential(*(PlainMoE() for _ in range(4))), nn.ModuleList(PlainMoE() for _ in range(4))):
        found = find_moe_layers(Wrapper(stack))
        assert [layer.name for layer in found] == [f"moe_stack.{i}" for i in range(4)]


def test_unnamed_lists_need_a_router_with_exactly_their_number_of_rows():
    class Layer(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.gate = nn.Linear(16, rows, bias=False)

    assert find_moe_layers(Layer(4))[0].projections == {"weight": (16, 16)}
    with pytest.raises(MoELayerError, match="no Mixture-of-Experts layer"):
        find_moe_layers(Layer(5))


def test_more_than_ten_experts_keep_their_order():
    model = PlainMoE(experts=12)
    layer = find_moe_layers(model)[0]
    for expert in range(12):
        assert layer.expert_weights(expert)["0"].data_ptr() == model.experts[expert][0].weight.data_ptr()


@pytest.mark.parametrize(
    ("model_type", "changes", "layers"),
    [
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2}, 4),  # two routers per layer
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "head_dim": 16}, 2),
        ("zaya", {}, 40),  # an MLP router with one row more than experts
    ],
)
def test_less_common_layouts_on_meta(model_type, changes, layers):
    sizes = {**DECODER, "moe_intermediate_size": 32, **changes} if changes else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    assert len(find_moe_layers(model)) == layers


def test_wrappers_do_not_change_names(mixtral):
    names = [(layer.name, layer.router) for layer in find_moe_layers(mixtral)]
    compiled = torch.compile(mixtral)
    assert [(layer.name, layer.router) for layer in find_moe_layers(compiled)] == names

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mixtral

    assert root_model(Wrapper()) is mixtral
    assert [(layer.name, layer.router) for layer in find_moe_layers(Wrapper())] == names


def test_a_dense_model_is_an_error():
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODER))
    with pytest.raises(MoELayerError, match=r"no Mixture-of-Experts layer found in LlamaForCausalLM.*dense"):
        find_moe_layers(dense)


def test_experts_without_a_router_are_an_error():
    model = nn.Sequential(PlainMoE(), PlainMoE(router=False))
    with pytest.raises(MoELayerError, match=r"experts at '1\.experts' have no router: no matrix with 4 rows"):
        find_moe_layers(model)
    assert [layer.name for layer in find_moe_layers(model, skip_unrouted=True)] == ["0"]


def test_two_possible_routers_are_reported():
    model = PlainMoE()
    model.gate = nn.Linear(32, 4, bias=False)
    with pytest.raises(MoELayerError, match=r"several possible routers: router\.weight, gate\.weight"):
        find_moe_layers(model)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        # a transposed router (d, E) must not be read as d rows
        (lambda: Holder(w_gate=bank(16, 8), experts=linears(8)), "no router"),
        # a classifier further up is not a router
        (lambda: Holder(head=nn.Linear(16, 4), block=Holder(mlp=Holder(experts=linears(4)))), "no router"),
        # banks that no rule covers must not be skipped beside a layer that is understood
        (lambda: Holder(gate=nn.Linear(16, 4), experts=Holder(w=bank(4, 16, 16))), "not understood"),
        (lambda: Holder(gate=nn.Linear(16, 4), experts=Holder(w=bank(64, 16), v=bank(64, 16))), "not understood"),
        (
            lambda: Holder(gate=nn.Linear(16, 2), experts=nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 8)])),
            "not understood",
        ),
        # two lists of experts with one router
        (
            lambda: Holder(gate=nn.Linear(16, 4), experts_1=linears(4), experts_2=linears(4)),
            "would serve two lists of experts",
        ),
    ],
)
def test_nothing_is_guessed_or_skipped(layer, message):
    for model in (layer(), Holder(first=PlainMoE(), second=layer())):
        with pytest.raises(MoELayerError, match=message):
            find_moe_layers(model)


def test_shared_experts_are_left_alone():
    model = PlainMoE()
    model.shared = Holder(experts=linears(2))
    assert [layer.experts for layer in find_moe_layers(model)] == ["experts"]


def test_the_first_projection_is_the_one_that_reads_the_layers_input():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(64, 16), nn.Linear(16, 64)

    model = Holder(gate=nn.Linear(16, 4), experts=nn.ModuleList(Expert() for _ in range(4)))
    assert find_moe_layers(model)[0].first_projection(1).data_ptr() == model.experts[1].up.weight.data_ptr()
    # three banks with a hidden width of twice the input: w1 is whole, not half of a fused gate_up
    banks = Holder(w1=bank(4, 32, 16), w3=bank(4, 32, 16), w2=bank(4, 16, 32))
    layer = find_moe_layers(Holder(gate=nn.Linear(16, 4), experts=banks))[0]
    assert layer.first_projection(0).shape == (32, 16)


def test_a_bank_with_unused_slices():
    """longcat_flash: gate_up holds null experts' slices too, and the router has their rows last."""
    banks = Holder(gate_up_proj=bank(6, 32, 16), down_proj=bank(4, 16, 16))
    banks.__class__ = type("LongcatFlashExperts", (Holder,), {})
    layer = find_moe_layers(Holder(classifier=nn.Linear(16, 6), experts=banks))[0]
    assert layer.num_experts == 4
    assert layer.projections == {"gate_up_proj": (32, 16), "down_proj": (16, 16)}


def test_routers_whose_norm_means_something_else_are_named():
    gate = Holder(weight=bank(4, 16))
    gate.register_buffer("tid2eid", torch.zeros(10, 2, dtype=torch.long))
    assert find_moe_layers(Holder(gate=gate, experts=linears(4)))[0].caveat == "hash"
    mlp = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    assert find_moe_layers(Holder(router=mlp, experts=linears(4)))[0].caveat == "mlp"
    cosine = type("CosineRouter", (Holder,), {})(weight=bank(4, 16))
    assert find_moe_layers(Holder(gate=cosine, experts=linears(4)))[0].caveat == "cosine"
    assert find_moe_layers(PlainMoE())[0].caveat == ""


def test_expert_index_out_of_range(mixtral):
    with pytest.raises(IndexError, match=r"experts 0\.\.7, got 8"):
        find_moe_layers(mixtral)[0].expert_weights(8)


# -- found in review: each gave a wrong layer without an error --------------------------------------------------------


def test_a_transposed_router_does_not_turn_the_experts():
    model = Holder(router=bank(32, 8), experts=Holder(w1=bank(8, 32, 64), w2=bank(8, 64, 32)))  # x @ w everywhere
    (layer,) = find_moe_layers(model, router_pattern="router")
    assert layer.transposed
    assert layer.projections == {"w1": (64, 32), "w2": (32, 64)}
    assert layer.first == "w1"


def test_shared_experts_beside_routed_ones_in_one_module():
    layer_class = type("FusedMoE", (Holder,), {})
    shared = layer_class(
        gate=nn.Linear(16, 4),
        w1=bank(4, 32, 16),
        w2=bank(4, 16, 32),
        shared_w1=bank(2, 32, 16),
        shared_w2=bank(2, 16, 32),
    )
    (layer,) = find_moe_layers(shared)
    assert (layer.num_experts, list(layer.projections)) == (4, ["w1", "w2"])
    unnamed = layer_class(
        gate=nn.Linear(16, 4), w1=bank(4, 32, 16), w2=bank(4, 16, 32), v1=bank(2, 32, 16), v2=bank(2, 16, 32)
    )
    with pytest.raises(MoELayerError, match="no Mixture-of-Experts layer"):
        find_moe_layers(unnamed)


def test_a_matrix_inside_the_experts_is_not_taken_for_an_unnamed_router():
    banks = {"w1": bank(8, 32, 64), "w2": bank(8, 64, 32)}
    clear = Holder(experts=Holder(**banks, scale=bank(8, 16)), selector=nn.Linear(32, 8))
    assert find_moe_layers(clear)[0].router == "selector.weight"
    unclear = Holder(experts=Holder(**banks, b2=bank(8, 32)), selector=nn.Linear(32, 8))
    with pytest.raises(MoELayerError, match=r"several possible routers: experts\.b2, selector\.weight"):
        find_moe_layers(unclear)


def test_a_network_router_as_wide_as_the_experts():
    router = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4))
    assert find_moe_layers(Holder(router=router, experts=experts))[0].first == "0"
    fused = Holder(router=router, experts=Holder(w1=bank(4, 64, 32), w2=bank(4, 32, 64)))
    (layer,) = find_moe_layers(fused)
    assert layer.projections == {"w1": (64, 32), "w2": (32, 64)}


@pytest.mark.parametrize("experts", [Holder(w1=bank(4, 64, 32), w2=bank(4, 32, 64)), linears(4, 32)])
def test_experts_under_two_routers_are_an_error(experts):
    model = Holder(a=Holder(gate=nn.Linear(32, 4), experts=experts), b=Holder(gate=nn.Linear(32, 4), experts=experts))
    with pytest.raises(MoELayerError, match=r"'b\.experts' are those at 'a\.experts', under another router"):
        find_moe_layers(model)


def test_skipping_unrouted_experts_hides_nothing_else():
    with pytest.raises(MoELayerError, match=r"'1\.experts'.* beside other ones"):
        find_moe_layers(nn.Sequential(PlainMoE(), PlainMoE()), skip_unrouted=True, router_pattern=r"^0\.router")


@pytest.mark.parametrize("model_type", ["mixtral", "afmoe", "gemma4_text", "hunyuan_v1_moe", "jetmoe", "granitemoe"])
def test_how_many_experts_serve_a_token(model_type):
    layers = find_moe_layers(build_tiny(model_type, device="meta"))
    assert [layer.shape.top_k for layer in layers] == [2] * len(layers)
