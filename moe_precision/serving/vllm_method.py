"""How vLLM runs a layer of packed experts.

Everything that could run on other weights than the packed ones is an error while the engine is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform

from ..quantize.matrices import PackedMatrices
from ..quantize.modules import set_activations
from .errors import ServingError
from .packed_model import PackedModel
from .share import even_share, mapped_share

_THREE_DIMENSIONS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "lfm2_moe")
_ACTIVATIONS = "moe_precision_activations"  # a key of vLLM's --additional-config


class PackedExpertsMethod(FusedMoEMethodBase):
    """Runs the packed experts of one layer of vLLM.

    Args:
        packed_for: Gives the checkpoint, laid out for activations of a dtype.
        layer: vLLM's layer.
        prefix: Its path.

    Raises:
        ServingError: The plan has no such layer, or vLLM's layer is not what was packed, or is run in a way that
            packed experts do not support.
    """

    def __init__(self, packed_for: Callable[[torch.dtype], PackedModel], layer: RoutedExperts, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.dtype = layer.moe_config.in_dtype
        self.packed = packed_for(self.dtype)
        self.name = self.packed.layer_at(prefix)
        self._check(layer, prefix)

    def _check(self, layer: RoutedExperts, prefix: str) -> None:
        moe, ours = layer.moe_config, self.packed.layers[self.name]
        theirs = moe.num_experts, moe.hidden_dim, moe.intermediate_size
        expected = ours.found.num_experts, ours.width, ours.neurons
        if theirs != expected:
            raise ServingError(
                f"vLLM's layer {prefix!r} has (experts, width, neurons) {theirs}, and the packed layer {self.name!r} "
                f"{expected}: config.json was changed, or vLLM adds experts of its own"
            )
        parallel = moe.moe_parallel_config
        unsupported = {
            "data parallelism": parallel.dp_size > 1,
            "context parallelism of prefill": parallel.pcp_size > 1,
            "sequence parallelism of experts": parallel.is_sequence_parallel,
            "load balancing of experts (EPLB)": parallel.enable_eplb,
            "router weights on the input": layer.apply_router_weight_on_input,
            "LoRA on experts": _has_lora_on_experts(),
            "draft layers (speculative decoding)": prefix.startswith("mtp.") or ".mtp." in prefix,
        }
        for what, asked in unsupported.items():
            if asked:
                raise ServingError(f"layer {prefix!r}: {what} is not supported with packed experts; start without it")
        if current_platform.is_cpu() and _turns_wrongly():
            raise ServingError(
                "vLLM's operator for rotary positions is wrong for this model on a CPU, so tokens would be others, as "
                "they are with the float model: start without --enforce-eager, or add --compilation-config "
                + """'{"custom_ops": ["-rotary_embedding"]}'"""
            )

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """Makes the empty packed matrices of the experts that this process holds."""
        parallel = self.moe.moe_parallel_config
        if parallel.use_ep and parallel.ep_size > 1:
            held = mapped_share(layer._expert_map.tolist())
        else:
            held = even_share(self.moe.num_experts, parallel.tp_rank, parallel.tp_size)
        layer.packed_experts = self.packed.experts(self.name, held, torch.get_default_device())
        activations = (get_current_vllm_config().additional_config or {}).get(_ACTIVATIONS, "int8")
        if any(isinstance(module, PackedMatrices) for module in layer.packed_experts.modules()):
            set_activations(layer.packed_experts, activations)

    def maybe_roundup_sizes(self, hidden_size: int, neurons: int, *args: Any) -> tuple[int, int]:
        return hidden_size, neurons  # the kernels take any size

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Checks that the experts have been filled, whatever loader was used, and that the router is the model's."""
        layer.packed_experts.check_filled(self.name)
        if current_platform.is_cpu() and _loses_bias(layer):
            raise ServingError(
                f"layer {self.name!r}: vLLM's router for CPUs leaves out its correction bias "
                "(e_score_correction_bias), so tokens would go to other experts, as they do in the float model: "
                "start it with --model-impl transformers"
            )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        found: Tensor = torch.ops.moe_precision.served_experts(x, topk_weights, topk_ids, layer.layer_name)
        return found


def _has_lora_on_experts() -> bool:
    lora = get_current_vllm_config().lora_config
    targets = None if lora is None else lora.target_modules
    return lora is not None and (targets is None or any("expert" in target for target in targets))


def _turns_wrongly() -> bool:
    """Whether vLLM 0.32's `RotaryEmbedding.forward_cpu` gets queries of three dimensions, which it turns in part."""
    model = get_current_vllm_config().model_config
    queries = model.hf_text_config.model_type in _THREE_DIMENSIONS and not model.using_transformers_backend()
    return queries and RotaryEmbedding.enabled()


def _loses_bias(layer: RoutedExperts) -> bool:
    """Whether vLLM 0.32's `CPURouter` takes its plain softmax for a router with a bias; one of zeros is no loss."""
    plain = layer.scoring_func == "softmax" and not layer.use_grouped_topk and layer.custom_routing_function is None
    return plain and layer.e_score_correction_bias is not None and bool(layer.e_score_correction_bias.any())


@torch.library.custom_op("moe_precision::served_experts", mutates_args=())
def served_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """Runs a layer's packed experts; one operator to torch.compile, which does not look inside."""
    runner: Any = get_forward_context().no_compile_layers[layer_name]
    found: Tensor = runner.routed_experts.packed_experts(x, topk_ids, topk_weights)
    return found


@served_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
