"""A small Mixtral in llama.cpp, for benchmarks/llama_cpp.py: run in the environment that holds it, without torch.

A checkpoint of transformers becomes a GGUF, with experts in one of ggml's types, attention in the same or another one,
and everything else in bfloat16.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.llama_tools import ROWS, TYPES, quantized

STEPS = 16  # of decoding
PROMPT = 8  # tokens before them


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint in bfloat16, as uint16."""
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            start = opened.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", entry
                offset, last = entry["data_offsets"]
                flat = np.memmap(file, np.uint16, "r", start + offset, ((last - offset) // 2,))
                found[name] = flat.reshape(entry["shape"])
    return found


def floats(bfloat16: np.ndarray) -> np.ndarray:
    """Bfloat16 that is held as uint16, in float32."""
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def write_gguf(checkpoint: Path, kind: str, attention: str, path: Path) -> None:
    """Writes the GGUF of a Mixtral.

    Args:
        checkpoint: In bfloat16, under the names of the Hub.
        kind: Of the experts, one of `TYPES`. Except in bf16, the rows of an expert repeat its first ones.
        attention: Of the matrices of attention, likewise.
        path: Of the file.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    weights, bf16 = tensors(checkpoint), gguf.GGMLQuantizationType.BF16
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: np.ndarray) -> None:
        if tensor.ndim == 1 or "gate_inp" in name:  # norms and routers are in float32 there
            writer.add_tensor(name, floats(tensor))
        elif "attn" in name and attention != "bf16":
            of_type = gguf.GGMLQuantizationType(TYPES[attention])
            writer.add_tensor(name, quantized(attention, floats(tensor)), raw_dtype=of_type)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor).view(np.uint8), raw_dtype=bf16)

    def in_order(tensor: np.ndarray, of: int) -> np.ndarray:
        """Rotated pairs side by side, as llama.cpp's own conversion puts them."""
        return tensor.reshape(of, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)

    def experts(name: str, matrices: list[np.ndarray]) -> None:
        if kind == "bf16":
            writer.add_tensor(name, np.stack(matrices).view(np.uint8), raw_dtype=bf16)
            return
        rows = [np.tile(quantized(kind, floats(one[:ROWS])), (len(one) // ROWS, 1)) for one in matrices]
        writer.add_tensor(name, np.stack(rows), raw_dtype=gguf.GGMLQuantizationType(TYPES[kind]))

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        here, there = f"model.layers.{layer}", f"blk.{layer}"
        add(f"{there}.attn_norm.weight", weights[f"{here}.input_layernorm.weight"])
        add(f"{there}.ffn_norm.weight", weights[f"{here}.post_attention_layernorm.weight"])
        add(f"{there}.attn_q.weight", in_order(weights[f"{here}.self_attn.q_proj.weight"], heads))
        add(f"{there}.attn_k.weight", in_order(weights[f"{here}.self_attn.k_proj.weight"], kv_heads))
        add(f"{there}.attn_v.weight", weights[f"{here}.self_attn.v_proj.weight"])
        add(f"{there}.attn_output.weight", weights[f"{here}.self_attn.o_proj.weight"])
        moe = f"{here}.block_sparse_moe"
        add(f"{there}.ffn_gate_inp.weight", weights[f"{moe}.gate.weight"])
        for part, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            of_each = [weights[f"{moe}.experts.{i}.{w}.weight"] for i in range(config["num_local_experts"])]
            experts(f"{there}.ffn_{part}_exps.weight", of_each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _errors(level: int, text: bytes, data: object) -> None:
    if level == 4:
        print(text.decode(), file=sys.stderr)


class Model:
    """A GGUF in llama.cpp.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        from llama_cpp import llama_cpp as c

        self.c = c
        self.log = c.llama_log_callback(_errors)  # llama.cpp keeps it
        c.llama_log_set(self.log, ctypes.c_void_p(0))
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 8192, 512, 512, 8
        self.context = c.llama_init_from_model(self.model, settings)
        assert self.model, path
        assert self.context, path
        self.batch = c.llama_batch_init(512, 0, 1)
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def clear(self, threads: int) -> None:
        """Forgets all tokens."""
        self.c.llama_set_n_threads(self.context, threads, threads)
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)

    def decode(self, tokens: list[int], places: list[int], sequences: list[int]) -> None:
        """Runs tokens of some sequences; the logits of the last token of each are made."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, place, sequence) in enumerate(zip(tokens, places, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, place, 1, sequence
            batch.logits[i] = i + 1 == len(tokens) or sequences[i + 1] != sequence
        status = self.c.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode gives {status}"

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of the last of some tokens, ``(vocabulary,)`` float32."""
        self.clear(1)
        self.decode(tokens, list(range(len(tokens))), [0] * len(tokens))
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (self.vocabulary,)).copy()

    def seconds(self, requests: int, tokens: int, threads: int) -> float:
        """CPU time of one prefill of `tokens`, or, with several or none, of a step of decoding for all requests."""
        self.clear(threads)
        if tokens:
            start = time.process_time()
            self.decode([5 + i % 1000 for i in range(tokens)], list(range(tokens)), [0] * tokens)
            return time.process_time() - start
        everyone = range(requests)
        for one in everyone:
            self.decode([5 + one] * PROMPT, list(range(PROMPT)), [one] * PROMPT)
        start = time.process_time()
        for step in range(STEPS):
            self.decode([7 + step + one for one in everyone], [PROMPT + step] * requests, list(everyone))
        return (time.process_time() - start) / STEPS


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4]))
