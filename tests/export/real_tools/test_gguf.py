"""llama-quantize reads our list with its own parser and gives every tensor of experts the planned type."""

import os
import subprocess

import gguf
import numpy as np
import pytest

from moe_precision import allocate
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.export import export
from moe_precision.export.names import all_places, gguf_tensor
from tests.support.models import build

ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(family):
    plan = allocate(build(family), method="uniform", average_bits=4, bits=(4,), group_size=32)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], 3)
    for place in all_places(plan):
        hub = f"{place.layer}.experts.{place.part}"
        assert names.get_name(hub, try_suffixes=(".weight",)) == gguf_tensor(place)


def test_llama_quantize_gives_every_tensor_its_type(checkpoint, by_layer, tmp_path):
    found = export(by_layer, "gguf")
    (tmp_path / "types.txt").write_text(found.text)
    _write_gguf(checkpoint, by_layer, tmp_path / "float.gguf")
    command = [os.environ["LLAMA_QUANTIZE"], "--tensor-type-file", str(tmp_path / "types.txt")]
    command += [str(tmp_path / "float.gguf"), str(tmp_path / "out.gguf"), "Q8_0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types.pop("token_embd.weight") == "q8_0"
    assert types == {f"{name}.weight": kind for name, kind in found.config.items()}
    assert set(types.values()) == {"q2_k", "q3_k", "q4_k", "q8_0"}


def _write_gguf(checkpoint, plan, path) -> None:
    """The experts of a Mixtral and its embedding as convert_hf_to_gguf writes them."""
    model = load_model(checkpoint, dtype="float32")
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tensor("token_embd.weight", model.get_input_embeddings().weight.detach().numpy().astype(np.float32))
    for place in all_places(plan):
        bank = model.get_parameter(place.fused).detach()
        if place.projection == "gate_up_proj":
            bank = bank.chunk(2, dim=1)[place.part == "up_proj"]
        writer.add_tensor(f"{gguf_tensor(place)}.weight", bank.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
