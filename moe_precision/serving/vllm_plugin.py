"""The entry point ``vllm.general_plugins``: vLLM calls `register` in every process, before it looks at a model."""

from __future__ import annotations


def register() -> None:
    """Makes vLLM know ``quant_method = "moe_precision"``; calling it again changes nothing.

    It imports of this package only what `vllm_config` and `vllm_loading` need, which is next to nothing: torch's and
    transformers' models are imported where a packed checkpoint is opened.
    """
    from vllm.model_executor.layers import quantization

    from .vllm_config import QUANT_METHOD, VllmPackedConfig
    from .vllm_loading import hook_loading

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        hook_loading()
        quantization.register_quantization_config(QUANT_METHOD)(VllmPackedConfig)
