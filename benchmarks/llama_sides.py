"""One side of benchmarks/llama_cpp.py in a process of its own: answers each line of JSON on stdin with seconds.

The sides of llama.cpp run in the environment that holds it, without torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llama_models import PROMPT, STEPS, Model
from benchmarks.llama_tools import LAYER, Experts, activations, cpu_seconds, routes

GROUP = 128
CHECKED = list(range(20, 32))  # tokens whose logits are compared


def our_experts() -> Callable[[dict[str, Any]], float]:
    """Products of our projections, made when they are first asked for."""
    import torch

    from moe_precision.quantize.modules import PackedProjection

    shapes = (2 * LAYER.intermediate, LAYER.hidden), (LAYER.hidden, LAYER.intermediate)

    def made(widths: tuple[int, ...]) -> list[PackedProjection]:
        found = []
        for shape in shapes:
            every = list(widths) * (LAYER.experts // len(widths))
            projection = PackedProjection(every, shape, GROUP, torch.bfloat16)
            for bucket in projection.children():
                for name, tensor in bucket.named_buffers():
                    if name == "ends":  # of scales and offsets
                        tensor.copy_(torch.tensor([0.01, 0.02, -0.03, -0.02]))
                    else:
                        tensor.random_(256)
            found.append(projection)
        return found

    known: dict[tuple[int, ...], list[PackedProjection]] = {}

    @torch.inference_mode()
    def seconds(asked: dict[str, Any]) -> float:
        torch.set_num_threads(asked["threads"])
        widths = tuple(asked["widths"])
        gate_up, down = known.setdefault(widths, known.get(widths) or made(widths))
        first, second = (torch.from_numpy(x).bfloat16() for x in activations(asked["tokens"]))

        def run(chosen: torch.Tensor) -> torch.Tensor:
            expert, order = chosen.flatten().sort(stable=True)
            starts = torch.searchsorted(expert, torch.arange(LAYER.experts + 1))
            gate_up(first[order // LAYER.top], starts)
            y = down(second.flatten(0, 1)[order], starts)
            return torch.empty_like(y).index_copy_(0, order, y)

        return cpu_seconds(run, [torch.from_numpy(one).long() for one in routes(asked["tokens"], asked["turn"])])

    return seconds


def their_experts() -> Callable[[dict[str, Any]], float]:
    """Products of ggml's matrices, made when they are first asked for."""
    known: dict[str, Experts] = {}

    def seconds(asked: dict[str, Any]) -> float:
        experts = known.setdefault(asked["kind"], known.get(asked["kind"]) or Experts(asked["kind"]))
        experts.prepare(activations(asked["tokens"]), asked["threads"])
        return cpu_seconds(experts.run, routes(asked["tokens"], asked["turn"]))

    return seconds


def our_model(folder: str) -> Callable[[dict[str, Any]], float]:
    """A checkpoint in transformers: one prefill, or a step of decoding."""
    import torch
    from transformers import AutoModelForCausalLM

    import moe_precision  # noqa: F401  (registers the quantizer)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def seconds(asked: dict[str, Any]) -> float:
        torch.set_num_threads(asked["threads"])
        requests, tokens = asked["requests"], asked["tokens"]
        if tokens:
            ids = torch.arange(tokens)[None] % 1000 + 5
            start = time.process_time()
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return time.process_time() - start
        prompts = (torch.arange(requests) + 5)[:, None].expand(-1, PROMPT)
        cache = model(input_ids=prompts, use_cache=True, logits_to_keep=1).past_key_values
        start = time.process_time()
        for step in range(STEPS):
            model(input_ids=(torch.arange(requests) + step + 7)[:, None], past_key_values=cache, use_cache=True)
        return (time.process_time() - start) / STEPS

    return seconds


def their_model(path: str, logits: str = "") -> Callable[[dict[str, Any]], float]:
    """The same of a GGUF in llama.cpp, after a comparison with the logits of `CHECKED` in a file."""
    model = Model(Path(path))
    if logits:
        expected = np.load(logits)
        error = np.linalg.norm(model.logits(CHECKED) - expected) / np.linalg.norm(expected)
        assert error < 0.05, f"the GGUF is another model than the checkpoint: its logits are off by {error:.2f}"
    return lambda asked: model.seconds(**asked)


SIDES: dict[str, Callable[..., Callable[[dict[str, Any]], float]]] = {
    "our_experts": our_experts,
    "their_experts": their_experts,
    "our_model": our_model,
    "their_model": their_model,
}


if __name__ == "__main__":
    seconds = SIDES[sys.argv[1]](*sys.argv[2:])
    for line in sys.stdin:
        print("SECONDS", seconds(json.loads(line)), flush=True)
