"""Packed checkpoints in a serving engine: vLLM, as a plugin that it finds by itself.

`packed_model`, `names` and `share` know no engine. vLLM calls `vllm_plugin`, and works with `vllm_config`,
`vllm_method` and `vllm_loading`.
"""
