"""mlx-lm's names: where the matrices of all experts are in its models, and what its configs call things.

Taken from the source of mlx-lm 0.32.2, one family at a time, because it renames modules as it likes, and leaves a
module that no name matches in float without a word. A family that is not here is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from .exported import ExportError
from .names import Place, block


@dataclass(frozen=True)
class Family:
    """How mlx-lm lays out one model type of transformers.

    Attributes:
        experts: Path of the module that holds all experts of a block, with ``{}`` in place of its index.
        needs: Keys that mlx-lm reads from config.json and transformers 5 does not write there, or not under this name.
            Without some of them mlx-lm stops; of others it takes its own default without a word.
        parts: Name of a matrix after unfusing -> its name there.
    """

    experts: str
    needs: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = (
        ("gate_proj", "gate_proj"),
        ("up_proj", "up_proj"),
        ("down_proj", "down_proj"),
    )

    @property
    def inside(self) -> bool:
        """Whether the text model is a part of another one, with a ``text_config``."""
        return "language_model." in self.experts


_MLP = "model.layers.{}.mlp.switch_mlp"
_EXPERTS = "model.layers.{}.mlp.experts"
_SPARSE = "model.layers.{}.block_sparse_moe.switch_mlp"
_FEED_FORWARD = "model.layers.{}.feed_forward.switch_mlp"
_ROPE = ("rope_theta",)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(_EXPERTS, _ROPE),
    "bailing_hybrid": Family(_MLP, ("num_experts_per_tok", "n_group", "group_norm_size", "max_position_embeddings")),
    "deepseek_v2": Family(_MLP, ("rope_theta", "rope_scaling")),
    "deepseek_v3": Family(_MLP, _ROPE),
    "deepseek_v32": Family(_MLP, _ROPE),
    "dots1": Family(_EXPERTS, _ROPE),
    "ernie4_5_moe": Family(_MLP, _ROPE),
    "exaone_moe": Family(_MLP, ("head_dim", "is_moe_layer")),
    "gemma4": Family("language_model.model.layers.{}.experts.switch_glu"),
    "gemma4_text": Family("model.layers.{}.experts.switch_glu"),
    "glm4_moe": Family(_MLP, ("head_dim", "rope_theta", "rope_scaling", "partial_rotary_factor")),
    "glm4_moe_lite": Family(_MLP, ("rope_theta", "first_k_dense_replace")),
    "glm_moe_dsa": Family(_MLP, ("topk_method", "scoring_func", "moe_layer_freq")),
    "gpt_oss": Family(_EXPERTS, _ROPE),
    "granitemoe": Family(_SPARSE, _ROPE),
    "granitemoehybrid": Family(_SPARSE, ("layer_types",)),
    "jamba": Family(_FEED_FORWARD),
    "kimi_k25": Family("language_model." + _MLP, _ROPE),
    "kimi_linear": Family(_MLP, ("rope_theta", "linear_attn_config", "first_k_dense_replace")),
    "laguna": Family(_MLP),
    "lfm2_moe": Family(_FEED_FORWARD),
    "llama4": Family("language_model.model.layers.{}.feed_forward.experts", ("rope_theta", "rope_scaling")),
    "longcat_flash": Family(
        _MLP, ("attention_method", "zero_expert_type", "rope_theta", "mla_scale_q_lora", "mla_scale_kv_lora")
    ),
    "mellum": Family(_MLP, ("num_experts",)),
    "mimo_v2_flash": Family(
        _MLP,
        (
            *("hybrid_layer_pattern", "moe_layer_freq", "add_swa_attention_sink_bias", "add_full_attention_sink_bias"),
            *("sliding_window_size", "n_shared_experts", "topk_method", "scoring_func", "layernorm_epsilon"),
            *("rope_theta", "partial_rotary_factor", "swa_rope_theta", "swa_num_attention_heads"),
            *("swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
        ),
    ),
    "minimax_m2": Family(_SPARSE, ("shared_intermediate_size", "rope_theta", "rotary_dim")),
    "minimax_m3_vl": Family("language_model." + _SPARSE),
    "mistral4": Family(_MLP),
    "mixtral": Family(_SPARSE, _ROPE),
    "muse_spark": Family("model.language_model.layers.{}.mlp.experts"),
    "nemotron_h": Family("backbone.layers.{}.mixer.switch_mlp", parts=(("up_proj", "fc1"), ("down_proj", "fc2"))),
    "olmoe": Family(_MLP, _ROPE),
    "phimoe": Family(_SPARSE, _ROPE),
    "qwen2_moe": Family(_MLP, _ROPE),
    "qwen3_5_moe": Family("language_model." + _MLP),
    "qwen3_moe": Family(_MLP, ("num_experts", "head_dim", "rope_theta")),
    "qwen3_next": Family(_MLP, ("rope_theta", "partial_rotary_factor")),
    "qwen3_vl_moe": Family("language_model." + _MLP, ("num_experts", "rope_theta", "norm_topk_prob")),
    "solar_open": Family(_MLP, ("intermediate_size", "first_k_dense_replace", "rope_theta", "partial_rotary_factor")),
    "step3p5": Family(_MLP, ("num_attention_groups", "moe_num_experts", "moe_top_k", "moe_layers_enum", "rope_theta")),
}


def family_of(model_type: str) -> Family:
    """The layout of a model type.

    Raises:
        ExportError: Its names in mlx-lm are not known.
    """
    if model_type not in FAMILIES:
        raise ExportError(
            f"the names of {model_type!r} in mlx-lm are not known, and it leaves a matrix that no name matches in "
            f"float without a word; known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def mlx_module(place: Place, model_type: str) -> str:
    """Path of mlx-lm's module for a matrix of all experts.

    Raises:
        ExportError: The family is not known, the layer is not a block of a decoder, or it has other matrices.
    """
    family = family_of(model_type)
    parts = dict(family.parts)
    if place.part not in parts:
        raise ExportError(
            f"layer {place.layer!r}: mlx-lm's experts of {model_type!r} have the matrices {', '.join(parts)}, the plan "
            f"has {place.part!r}"
        )
    return f"{family.experts.format(block(place.layer))}.{parts[place.part]}"
