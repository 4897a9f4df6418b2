"""mlx-lm quantizes by a plan: names are those of its modules, bits and groups as planned."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import quantize_model

from moe_precision import allocate
from moe_precision.export import export
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
