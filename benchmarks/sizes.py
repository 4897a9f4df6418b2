"""What ten published models take at several widths, from their configs alone: the table of docs/sizes.md.

    python -m benchmarks.sizes

Nothing is downloaded. A config is what transformers' own class gives by default, where that is the published model, and
otherwise with the values that its publisher names. The number of parameters, which follows from the config, is beside
the published one, as a check.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from transformers import AutoConfig

from moe_precision.checkpoints.blueprint import model_of_float_config
from moe_precision.present.tables import show
from moe_precision.quantize.sizes import GIB, ModelSizes
from moe_precision.recording.collecting import memory_bytes
from moe_precision.recording.statistics import file_bytes

WIDTHS = (4, 3, 2.5, 2)


class Published(NamedTuple):
    """A published model.

    Attributes:
        model_type: Its family in transformers.
        billions: Parameters in billions, as published.
        values: What its config.json has in place of the defaults of transformers' class.
    """

    model_type: str
    billions: float
    values: dict[str, Any]


_QWEN3_235B = {
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "head_dim": 128,
}
_KIMI_K2 = {
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
}
MODELS = {
    "OLMoE-1B-7B": Published("olmoe", 6.92, {"intermediate_size": 1024}),
    "gpt-oss-20b": Published("gpt_oss", 20.9, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "Qwen3-30B-A3B": Published("qwen3_moe", 30.5, {"num_hidden_layers": 48, "head_dim": 128}),
    "Phi-3.5-MoE": Published("phimoe", 41.9, {}),
    "Mixtral-8x7B": Published("mixtral", 46.7, {}),
    "GLM-4.5-Air": Published("glm4_moe", 106, {"attention_bias": True}),
    "gpt-oss-120b": Published("gpt_oss", 116.8, {}),
    "Qwen3-235B-A22B": Published("qwen3_moe", 235, _QWEN3_235B),
    "DeepSeek-V3": Published("deepseek_v3", 671, {}),
    "Kimi K2": Published("deepseek_v3", 1000, _KIMI_K2),
}


def sizes_of(published: Published, name: str) -> ModelSizes:
    """The sizes of a published model."""
    config = AutoConfig.for_model(published.model_type, **published.values)
    return ModelSizes(model_of_float_config(config, name))


def main() -> None:
    """Prints the table."""
    table = Table(box=box.MARKDOWN)
    head = ["model", "billion parameters", "published", "in experts", "layers x experts", "group", "bfloat16, GiB"]
    head += [f"{bits:g} bits" for bits in WIDTHS] + ["rest", "second moments", "their file", "quantizing"]
    for column in head:
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, published in MODELS.items():
        sizes = sizes_of(published, name)
        gib = [sizes.float_bytes, *(sizes.expert_bytes(sizes.stored_bits(bits)) + sizes.rest_bytes for bits in WIDTHS)]
        gib += [sizes.rest_bytes, memory_bytes(sizes.layers), file_bytes(sizes.layers)]
        gib.append(sizes.quantizing_bytes(sizes.stored_bits(2.5)))
        table.add_row(
            name,
            f"{sizes.parameters / 1e9:.2f}",
            f"{published.billions:g}",
            f"{sizes.weights / sizes.parameters:.1%}",
            f"{len(sizes.layers)} x {sizes.layers[0].num_experts}",
            str(sizes.group_size),
            *(f"{nbytes / GIB:,.1f}" for nbytes in gib),
        )
    show(table)


if __name__ == "__main__":
    main()
