"""Tiny models of many families: the routers found are those of transformers' own classes, with the right norms."""

import pytest
import torch

from moe_precision import MoELayerError, UnsupportedLayoutError, find_moe_layers
from moe_precision.recording.router_norms import router_norms
from tests.support.model_zoo import build_tiny, config_types, eight_bit_error, routers_by_class

# One of each layout; `python -m tests.model_zoo` builds all types.
SPREAD = {
    "afmoe": (3, 8),
    "aria_text": (4, 8),  # transposed experts
    "bailing_hybrid": (3, 8),
    "cohere2_moe": (4, 8),
    "dbrx": (2, 8),  # flat banks
    "deepseek_v2": (3, 8),
    "deepseek_v32": (3, 8),
    "deepseek_v4": (4, 8),  # hash routers in the first layers
    "diffusion_gemma": (4, 8),  # encoder and decoder share their parameters
    "dots3_note_vision_encoder": (2, 4),  # another number of experts in each layer
    "ernie4_5_moe": (3, 8),
    "ernie4_5_vl_moe_text": (6, 8),  # two routers per layer
    "exaone_moe": (3, 8),
    "flex_olmo": (4, 8),
    "glm4_moe": (3, 8),
    "gpt_oss": (4, 8),  # transposed, biased, interleaved
    "granitemoehybrid": (4, 8),
    "hunyuan_v1_moe": (4, 8),
    "inkling_text": (4, 8),  # one row more, of a shared expert
    "jamba": (2, 8),
    "jetmoe": (8, 8),  # two routers per layer
    "kimi_linear": (3, 8),
    "llama4_text": (4, 8),  # transposed, without transformers' flag
    "longcat_flash": (4, 8),  # null experts' rows and slices
    "minimax_m2": (4, 8),
    "nemotron_h": (1, 8),  # no gate
    "nllb-moe": (2, 8),  # one module per expert
    "openai_privacy_filter": (4, 8),
    "phimoe": (4, 8),
    "qwen3_next": (4, 8),
    "qwen3_vl_moe_text": (4, 8),
    "step3p5": (1, 8),
    "switch_transformers": (8, 8),
    "zaya": (4, 8),  # an MLP router with one row more
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SPREAD)
def test_routers_of_many_families(model_type):
    layers_expected, experts = SPREAD[model_type]
    model = build_tiny(model_type)
    layers = find_moe_layers(model)
    assert len(layers) == layers_expected
    assert layers[0].num_experts == experts
    assert {id(layer.router_weight()) for layer in layers} == {id(router) for router in routers_by_class(model)}
    rows = [layer.router_weight()[: layer.num_experts].double().square().sum(1).sqrt().float() for layer in layers]
    torch.testing.assert_close(router_norms(layers), torch.cat(rows))
    parameters = {id(p) for p in model.parameters()}
    for layer in layers:
        assert {id(weight.parameter()) for bank in layer.banks.values() for weight in bank.weights} <= parameters
        weights = layer.expert_weights(layer.num_experts - 1)
        assert {name: tuple(w.shape) for name, w in weights.items()} == layer.projections
        first, *_, last = layer.projections.values()
        assert first[1] == last[0]  # an expert gives back the width that it takes
        assert layer.first_projection(0).shape[1] == first[1]


REFUSED = {"dbrx", "diffusion_gemma", "jetmoe", "llama4_text", "longcat_flash", "step3p5"}
NOT_RUN = {"dots3_note_vision_encoder"}  # it takes pictures
LOUD = {"switch_transformers": 0.02}  # a random one turns noise of 0.005 in its experts into 0.17


SLOW = {"kimi_linear"}  # its attention loops in Python


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.thorough] * (name in SLOW)) for name in SPREAD]
)
def test_packed_at_eight_bits(model_type):
    """Every layout either gives the float model's output, or is refused by the layer's name."""
    model = build_tiny(model_type)
    if model_type in REFUSED:
        with pytest.raises(UnsupportedLayoutError, match="layer '"):
            eight_bit_error(model)
        return
    error = eight_bit_error(model)
    assert (error is None) == (model_type in NOT_RUN)
    assert error is None or error < LOUD.get(model_type, 1e-2)


@pytest.mark.slow
def test_the_spread_names_types_that_exist():
    assert set(SPREAD) <= set(config_types())
    assert len(SPREAD) >= 25


@pytest.mark.parametrize(
    ("model_type", "caveats"),
    [("deepseek_v4", ["hash", "hash", "hash", ""]), ("zaya", ["mlp"] * 4), ("mixtral", [""] * 4)],
)
def test_what_a_norm_does_not_mean(model_type, caveats):
    assert [layer.caveat for layer in find_moe_layers(build_tiny(model_type))] == caveats


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("doge", "product-key router: 64 experts are pairs of its 16 rows"),
        ("vitpose_backbone", "experts at 'layer.0.mlp.experts' have no router"),
    ],
)
def test_no_row_an_expert_is_an_error(model_type, message):
    with pytest.raises(MoELayerError, match=message):
        find_moe_layers(build_tiny(model_type))


def test_flat_banks_hold_the_experts_that_the_forward_pass_uses():
    """dbrx: an expert computed from its matrices gives what the model's own module gives for it."""
    model = build_tiny("dbrx")
    layer = find_moe_layers(model)[0]
    x = torch.randn(3, 64)
    for expert in (0, 5):
        with torch.no_grad():
            for weight in layer.container().parameters():
                weight.normal_()
            own = layer.container()(
                x, *(layer.container().get_parameter(n).unflatten(0, (8, -1))[expert] for n in ("w1", "v1", "w2"))
            )
            w = layer.expert_weights(expert)
            out = (torch.nn.functional.silu(x @ w["w1"].T) * (x @ w["v1"].T)) @ w["w2"].T
        torch.testing.assert_close(out, own)
