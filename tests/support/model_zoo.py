"""A tiny model of every Mixture-of-Experts config type of the installed transformers, built from its config alone.

``python -m tests.support.model_zoo > docs/models.md`` builds all of them and prints the table of what was found.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_precision import MoELayerError, UnsupportedLayoutError, allocate, find_moe_layers, quantize_model
from moe_precision.quantize.replace import find_targets

EXPERTS = 8
_COUNT = re.compile(r"^(?:n_routed|num_local|num|moe_num)_experts$")
_AUTO = (AutoModelForSeq2SeqLM, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel)

SIZES: dict[str, Any] = {  # whatever config has the key gets the value
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),  # sequences are padded to it
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "num_key_value_heads", "depth"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "vocab_size": 256,
    "unpadded_vocab_size": 250,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "zero_expert_num": 4,
}
_TEXT_WIDTH = dict.fromkeys(("text_hidden_size", "out_hidden_size", "adapter_input_size", "adapter_output_size"), 64)
_LATENT_ATTENTION = ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k25")
_LATENT_ATTENTION += ("sarvam_mla",)
OVERRIDES: dict[str, dict[str, Any]] = {  # model_type of a config or sub-config -> what SIZES does not get right
    "dbrx": {"attn_config": {"rope_theta": 10000.0}, "n_layers": 2},
    **{name: {"num_key_value_heads": 4} for name in _LATENT_ATTENTION},
    "bailing_hybrid": {"n_group": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma_text": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 32},
    "doge": {"is_moe": True, "num_experts": 64},
    "dots3_note_audio_encoder": _TEXT_WIDTH,
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note_vision_encoder": {  # another number of experts in each layer
        "pyramid_num_routed": [-1, -1, 4, 8],
        "mlp_layer_types": None,
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "ernie4_5_vl_moe_text": {"hidden_size": 512, "moe_intermediate_size": [32, 16], "moe_k": 2},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
    "inkling2_vision": _TEXT_WIDTH,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 32},
    "mistral_large4_text": {"num_key_value_heads": 4},
    "muse_spark_audio": _TEXT_WIDTH,
    "muse_spark_vision": _TEXT_WIDTH,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "nemotron3_diarization_head": {"audio_hidden_size": 64},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "vitpose_backbone": {"part_features": 16},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen4_exp_text": {
        "indexer_budget": 64,
        "indexer_compress_ratio": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def config_types() -> list[str]:
    """Every registered type that can have experts: its config, or one inside it, has a number of experts."""
    return [name for name in sorted(CONFIG_MAPPING) if _can_have_experts(_default(CONFIG_MAPPING[name]))]


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return config_class()
        except Exception:  # a few types have no default: wrappers that must be given their parts
            return None


def _can_have_experts(config: PreTrainedConfig | None) -> bool:
    return config is not None and any(
        _can_have_experts(value) if isinstance(value, PreTrainedConfig) else bool(_COUNT.match(key))
        for key, value in vars(config).items()
    )


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    sizes = {**SIZES, **OVERRIDES.get(config.model_type, {})}
    kwargs = dict(OVERRIDES.get(config.model_type, {}))
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            kwargs[key] = {**_small(value), **kwargs.get(key, {})}
        elif key in kwargs:
            continue
        elif _COUNT.match(key) and value is not None:
            kwargs[key] = EXPERTS
        elif key in sizes and (isinstance(value, int) or key in ("head_dim",)):
            kwargs[key] = sizes[key]
    return kwargs


def build_tiny(model_type: str, device: str = "cpu") -> PreTrainedModel:
    """A model of a few MB with seeded random weights."""
    config_class = CONFIG_MAPPING[model_type]
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(**_small(config_class()))
        torch.manual_seed(0)
        for auto in _AUTO:
            if type(config) in auto._model_mapping:
                return auto.from_config(config)
        return _class_of(config)._from_config(config)


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The largest model of a config that has no auto class: the text tower of a multimodal model, for example."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    classes = [
        one
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, PreTrainedModel) and one.config_class is type(config)
    ]
    concrete = [one for one in classes if not one.__name__.endswith("PreTrainedModel")]
    return max(concrete, key=lambda one: "For" in one.__name__)


def routers_by_class(model: nn.Module) -> list[nn.Parameter]:
    """Routers by the names of transformers' own classes: independent of `find_moe_layers`."""
    found = {}
    for module in model.modules():
        if re.search(r"(?:Router|Gate|Gating|RouterMLP)$", type(module).__name__):
            matrices = [p for p in module.parameters() if p.ndim == 2 and EXPERTS // 2 <= p.shape[0] <= 2 * EXPERTS]
            found |= {id(parameter): parameter for parameter in matrices[-1:]}
    return list(found.values())


def describe(model_type: str) -> list[str]:
    """One row of docs/models.md."""
    try:
        model = build_tiny(model_type)
    except Exception as error:
        return [model_type, f"not built: {type(error).__name__}", "", "", "", ""]
    expected = len(routers_by_class(model))
    try:
        layers = find_moe_layers(model)
    except MoELayerError as error:
        reason = re.split(r"[;:]", str(error).replace("'model.layers.0.mlp.router_gate'", "it"))[0]
        return [model_type, f"0 of {expected}", "", reason, "", ""]
    kinds = {}
    for layer in layers:
        inner = layer.router.removeprefix(layer.name).lstrip(".")
        rows = layer.router_is.shape[0]
        experts = layer.experts.removeprefix(layer.name).lstrip(".") or "(the layer)"
        extra = f" ({rows - layer.num_experts} more rows)" if rows > layer.num_experts else ""
        kinds[f"`{inner}`{extra}"] = (
            f"`{experts}`, {layer.layout}{', transposed' if layer.transposed else ''}: " + ", ".join(layer.projections),
            layer.caveat,
        )
    experts = dict.fromkeys(text for text, _ in kinds.values())
    caveats = dict.fromkeys(caveat for _, caveat in kinds.values() if caveat)
    found = f"{len(layers)} of {expected}"
    return [model_type, found, ", ".join(kinds), "; ".join(experts), ", ".join(caveats), _packs(model)]


def _packs(model: PreTrainedModel) -> str:
    try:
        error = eight_bit_error(model)
    except UnsupportedLayoutError as error:
        return "no: " + re.sub(r"layer '[^']*': |; packed .*|, so packed .*", "", str(error))
    return "yes; not run: it takes other inputs than tokens or vectors" if error is None else f"yes, {error:.1e}"


@torch.no_grad()
def eight_bit_error(model: PreTrainedModel) -> float | None:
    """Relative error of a model's output when all of its experts are packed at 8 bits, the median over tokens.

    None where the float model does not run on tokens alone. The model is changed in place.

    Raises:
        UnsupportedLayoutError: Its experts cannot be packed.
    """
    widths = {shape[1] for layer in find_moe_layers(model) for shape in layer.projections.values()}
    plan = allocate(model, method="uniform", average_bits=8, bits=(8,), group_size=min(32, math.gcd(*widths)))
    find_targets(model, find_moe_layers(model), plan, None)
    model.eval().float()
    for weight in (
        w.parameter() for layer in find_moe_layers(model) for bank in layer.banks.values() for w in bank.weights
    ):
        if not 1e-6 < weight.abs().max() < 100:  # a few classes leave experts uninitialized
            weight.normal_(0, 0.02)
    inputs = next((inputs for inputs in _inputs(model) if _runs(model, inputs)), None)
    before = None if inputs is None else _output(model, inputs)
    quantize_model(model, plan)
    if inputs is None or before is None:
        return None
    after = _output(model, inputs)
    errors = (after - before).norm(dim=-1) / before.norm(dim=-1)  # a token whose expert changes is no error of packing
    return float(errors.median())


def _inputs(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Fixed tokens, and vectors for a model that takes no tokens."""
    random = torch.Generator().manual_seed(1)
    tokens, vectors = torch.randint(3, 128, (2, 9), generator=random), 0.02 * torch.randn(2, 9, 64, generator=random)
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return [{"input_ids": tokens, **extra}, {"inputs_embeds": vectors, **extra}]


def _runs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    try:
        _output(model, inputs)
    except Exception:  # towers of multimodal models need pictures or sound
        return False
    return True


def _output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or whatever a model gives first."""
    model = getattr(model, "thinker", model)  # what gives text, of a model that also speaks
    output = model(**inputs, use_cache=False)
    tensors = [value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return output.logits if "logits" in output else tensors[0]


def others() -> tuple[int, list[str]]:
    """How many types without experts can be built on the meta device, and in which of them a layer was found."""
    built, taken = 0, []
    for model_type in tqdm(sorted(set(CONFIG_MAPPING) - set(config_types())), unit="other", file=sys.stderr):
        try:
            model = build_tiny(model_type, device="meta")
        except Exception:  # needs a package that is not installed, or sizes of its own
            continue
        built += 1
        try:
            find_moe_layers(model)
            taken.append(model_type)
        except MoELayerError as error:
            if "no Mixture-of-Experts layer found" not in str(error):
                taken.append(model_type)
    return built, taken


def main() -> None:
    """Prints docs/models.md."""
    print(_HEAD.format(version=transformers.__version__))
    print("| config type | layers | router | experts | router is | packs |\n|---|---|---|---|---|---|")
    for model_type in tqdm(config_types(), unit="model", file=sys.stderr):
        print("| " + " | ".join(describe(model_type)) + " |", flush=True)
    print(_NLLB)
    built, taken = others()
    print(f"\nOf {built} other config types that build, {taken or 'none'} is taken for a Mixture of Experts.")


_HEAD = """# Models

Every config type of transformers {version} that can have experts, as a tiny model with {{experts}} experts.
`python -m tests.support.model_zoo > docs/models.md` builds all of them and prints this page.

- *layers*: MoE layers that `find_moe_layers` finds, of the routers that transformers' class names show.
- *router*: its weight, below the layer. Rows that belong to no routed expert come last and are left out.
- *experts*: where they are, how they are held, and the matrices of one expert. `fused`: slices of 3-D parameters;
  `flat`: blocks of rows of 2-D parameters; `modules`: one module per expert. *transposed*: matrices are `(in, out)`.
- *router is*: empty for one matrix whose row `e` gives the logit of expert `e`. `hash`: experts are picked by token
  id, and the rows only weight them. `mlp`: the last matrix of a network. The norms are recorded, and callback and
  plan say what they are.
- *packs*: "yes" if the quantize step takes these experts, with the relative error of the model's output (its logits
  if it has any) when all of them are packed at 8 bits. Otherwise the reason with which they are refused. The error is
  the median over 18 tokens, because in a random model a token changes its expert now and then. Rounding to 8 bits
  alone is half a percent of a random matrix; where only experts make the output, three matrices and a few layers of
  that are 1 or 2 %.

Some routers have more to a logit than the row: a bias per expert in gpt_oss, a scale per expert in gemma4, correction
terms in the DeepSeek-V3 line. They are recorded by the row alone, as in the method's paper. Layouts that structure
alone does not reveal are named with `router_pattern` and `expert_pattern`
([recording.md](recording.md#what-can-be-recorded)).
""".replace("{{experts}}", str(EXPERTS))

_NLLB = """
**nllb-moe**: in transformers 5.23 and 5.24 only its experts 0 and 1 run, each token through both kinds of weights,
because the router's mask is read as indices
([findings/nllb-moe-two-experts-run.sh](../findings/nllb-moe-two-experts-run.sh)). Its norms and curvature can be
recorded; statistics show what really runs, with routing weights of 1."""


if __name__ == "__main__":
    main()
