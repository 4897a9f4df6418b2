"""mlx-lm quantizes by a plan: names are those of its modules, bits and groups as planned."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import _get_classes, quantize_model

from moe_precision import PrecisionPlan, allocate, find_moe_layers
from moe_precision.export import export
from moe_precision.export.mlx_names import FAMILIES as KNOWN
from moe_precision.plans.layer_plan import LayerPlan
from tests.support.model_zoo import build_tiny
from tests.support.models import build, with_bits

FAMILIES = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
NEEDS = {  # of mlx-lm, beyond the config of transformers 5
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "head_dim": 16,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "attention_bias": False,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_experts_gets_its_bits(family):
    model = build(family)
    plan = allocate(model, method="uniform", average_bits=4, bits=(4,), group_size=32)
    widths = iter((2, 3, 4, 8) * 2)
    plan = with_bits(plan, lambda layer, projection, count: [next(widths)] * count)
    found = export(plan, "mlx")
    module = FAMILIES[family]
    config = {**NEEDS, **model.config.to_dict(), "num_experts": 8}
    config = {key: value for key, value in config.items() if value is not None or key == "rope_scaling"}
    theirs = module.Model(module.ModelArgs.from_dict(config))
    group_size, bits = found.config["group_size"], found.config["bits"]
    predicate = lambda path, module: found.config.get(path, False)  # noqa: E731  # as docs/export.md gives it
    _, made = quantize_model(theirs, {}, group_size, bits, quant_predicate=predicate)
    got = {
        path: one.bits
        for path, one in theirs.named_modules()
        if isinstance(one, QuantizedSwitchLinear | nn.QuantizedLinear)
    }
    planned = {path: one["bits"] for path, one in found.config.items() if isinstance(one, dict)}
    assert got == planned
    written = {path: one for path, one in made["quantization"].items() if isinstance(one, dict)}
    assert {path: (one["bits"], one["group_size"]) for path, one in written.items()} == {
        path: (one["bits"], one["group_size"]) for path, one in found.config.items() if isinstance(one, dict)
    }
    assert len(got) == 3 * len(plan.layers)
    out = theirs(mx.array([[3, 4, 5]]))
    mx.eval(out)
    assert bool(mx.isfinite(out).all())


SWA = {"swa_rope_theta": 1e4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
VALUES = {  # of what mlx-lm needs beyond transformers' config; where a family has none of its own
    **{"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 1.0, "head_dim": 16, "num_experts": 8},
    **{"norm_topk_prob": True, "first_k_dense_replace": 1, "intermediate_size": 128, "group_norm_size": 1},
    **{"n_group": 2, "num_experts_per_tok": 2, "max_position_embeddings": 128, "topk_method": "noaux_tc"},
    **{"scoring_func": "sigmoid", "moe_layer_freq": 1, "shared_intermediate_size": 32, "rotary_dim": 16},
}
OF_FAMILY = {
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "granitemoehybrid": {"layer_types": ["mamba"] * 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": {
        "linear_attn_config": {"kda_layers": [1, 2, 3, 4], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
    },
    "llama4": {"num_experts_per_tok": 1},
    "longcat_flash": {
        **{"attention_method": "MLA", "zero_expert_type": "identity"},
        **{"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    },
    "mimo_v2_flash": {
        **{"hybrid_layer_pattern": [0, 1, 1, 1], "moe_layer_freq": [0, 1, 1, 1], "sliding_window_size": 8},
        **{"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "n_shared_experts": None},
        **{"layernorm_epsilon": 1e-6, "swa_v_head_dim": 16, **SWA},
    },
    "solar_open": {"first_k_dense_replace": 0},
    "step3p5": {"num_attention_groups": 2, "moe_num_experts": 8, "moe_top_k": 2, "moe_layers_enum": "3"},
}


@pytest.mark.parametrize("family", KNOWN)
def test_names_are_those_of_its_modules(family):
    """With the keys that the export names, and no others, mlx-lm builds the model of transformers' config."""
    model = build_tiny(family, device="meta")
    layers = {
        layer.name: LayerPlan(layer.shape, {name: [4] * layer.num_experts for name in layer.projections})
        for layer in find_moe_layers(model)
    }
    found = export(PrecisionPlan(family, layers, 32, "uniform"), "mlx")
    config = model.config.to_dict()
    if KNOWN[family].inside and "text_config" not in config:  # the zoo builds the text model alone
        config = {"text_config": config}
    config = copy.deepcopy({**config, "model_type": family})
    needed = {key: {**VALUES, **OF_FAMILY.get(family, {})}[key] for key in KNOWN[family].needs}
    part = config["text_config"] if KNOWN[family].inside else config
    part.update({key: value for key, value in needed.items() if key not in part or key in OF_FAMILY.get(family, {})})
    part.update(OF_FAMILY.get(family, {}))
    for one in (config, part):
        for key in [key for key, value in one.items() if value is None and key not in needed and key != "rope_scaling"]:
            del one[key]
    built, args = _get_classes(config)
    theirs = built(args.from_dict(config))
    paths = {path for path, module in theirs.named_modules() if isinstance(module, SwitchLinear)}
    assert {path for path, of_one in found.config.items() if isinstance(of_one, dict)} == paths
