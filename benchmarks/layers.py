"""A layer's packed experts against bfloat16 in transformers' ``grouped_mm``, on a GPU or a CPU, in one process.

    python -m benchmarks.layers

Mixtral's layer (8 experts of 4096 x 14336, top 2) and one of 128 experts (2048 x 768, top 8), with experts of 2 and 3
bits in turn. Decode is one token and eight, prefill 2048. The bandwidth is that of reading the bytes of every expert
that has a token, in each form; beside it, its share of what a copy reaches on the same device. The last two columns are
ratios to bfloat16 too: with activations that are not rounded to int8 (on a CPU), and with half of the experts dropped.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch.utils.benchmark import Timer
from transformers import MixtralConfig, MixtralForCausalLM

from moe_precision import allocate, quantize_model, set_activations
from moe_precision.quantize.modules import kernels_of

LAYERS = {  # hidden size, intermediate size, experts, experts per token
    "Mixtral": (4096, 14336, 8, 2),
    "128 experts": (2048, 768, 128, 8),
}
TOKENS = {"decode 1": 1, "decode 8": 8, "prefill": 2048}
GROUP = 128


def seconds(experts: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Median time of a forward pass."""
    timer = Timer(
        "experts(*inputs)", globals={"experts": experts, "inputs": inputs}, num_threads=torch.get_num_threads()
    )
    return timer.blocked_autorange(min_run_time=1.0).median


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer = Timer("target.copy_(source)", globals={"source": source, "target": target})
    return 2 * size / timer.blocked_autorange(min_run_time=1.0).median


@torch.no_grad()
def main(device: str) -> None:
    """Prints the table."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    best = copy_bandwidth(device, 1 << 30)
    print(f"{name}, torch {torch.__version__}; a copy reads and writes {best / 1e9:.0f} GB/s\n")
    head = ["layer", "tokens", "bf16, ms", "ours, ms", "ratio", "bf16, GB/s", "ours, GB/s", "ours, share of a copy's"]
    head += ["activations as they are", "half of the experts dropped"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    used = {}
    for layer, (hidden, intermediate, count, top) in LAYERS.items():
        config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_local_experts=count,
            num_experts_per_tok=top,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=256,
            experts_implementation="grouped_mm",
        )
        model = MixtralForCausalLM(config).to(device, torch.bfloat16).eval()
        moe = model.model.layers[0].mlp
        inputs, before, weights = {}, {}, sum(p.numel() for p in moe.experts.parameters())
        for what, tokens in TOKENS.items():
            x = torch.randn(tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
            _, top_weights, index = moe.gate(x)
            inputs[what] = x, index, top_weights.to(x.dtype)
            before[what] = seconds(moe.experts, *inputs[what])
        plan = allocate(model, method="uniform", average_bits=2, bits=(2,), group_size=GROUP)
        mixed = plan.with_bits({name: [2, 3] * (count // 2) for name in plan.layers})
        halved = plan.with_bits({name: [0, 2, 3, 0] * (count // 4) for name in plan.layers})
        fewer = quantize_model(copy.deepcopy(model), halved).model.layers[0].mlp.experts
        model = quantize_model(model, mixed)
        packed = sum(buffer.nbytes for buffer in moe.experts.buffers())
        for what, (x, index, top_weights) in inputs.items():
            set_activations(model, "int8")
            after = seconds(moe.experts, x, index, top_weights)
            half = seconds(fewer, x, index, top_weights)
            set_activations(model, "bfloat16")
            exact = seconds(moe.experts, x, index, top_weights)
            share = len(index.unique()) / count  # of the experts
            speed = [bytes_ * share / time for bytes_, time in ((2 * weights, before[what]), (packed, after))]
            times = f"{1e3 * before[what]:.3f} | {1e3 * after:.3f} | {after / before[what]:.2f}"
            read = f"{speed[0] / 1e9:.0f} | {speed[1] / 1e9:.0f} | {speed[1] / best:.2f}"
            others = f"{exact / before[what]:.2f} | {half / before[what]:.2f}"
            print(f"| {layer} | {what} | {times} | {read} | {others} |", flush=True)
        set_activations(model, "int8")
        used[layer] = sorted({kernel.split(",")[0] for kernel in kernels_of(model).values()})
    print(f"\nkernels: {used}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda or cpu (default: a GPU if there is one)")
    main(parser.parse_args().device)
