"""Our fit against HQQ: time on one large matrix, and the loss of the demo's model with all experts at one width.

The cost of 8-bit scales is shown against float16 scales, and for groups that share a block with a larger one.

    pip install -e .[benchmarks]
    python -m benchmarks.quantizing [--run runs/demo]

Without a run the loss is left out. Both quantizers see the same matrices in the same groups.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.judging.evaluation import evaluate
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.plan import PrecisionPlan
from moe_precision.quantize.codec import fitting
from moe_precision.quantize.codec.fitting import quantize_matrix

SHAPE = (4096, 14336)


def hqq(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """HQQ's quantized weight, in float32."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(packed, meta).view_as(weight).float()


def ours(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Our quantized weight, in float32."""
    codes, scale, offset = quantize_matrix(weight, bits, group_size)
    groups = codes.view(*scale.shape, group_size).float()
    return (groups * scale.float()[..., None] + offset.float()[..., None]).view_as(weight)


def ours_float16(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Our quantized weight with a float16 scale and offset per group, 32 bits instead of 18."""
    with patch.object(fitting, "stored_scales", lambda scale, offset, _: (scale.half(), offset.half())):
        return ours(weight, bits, group_size)


def speed() -> None:
    """Prints seconds for one matrix, each quantizer in turn."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    print(f"one matrix of {SHAPE[0]} x {SHAPE[1]}, group 64, {torch.get_num_threads()} threads\n")
    print("| bits | HQQ, s | ours, s | times as fast |\n|---|---|---|---|")
    for bits in (2, 3, 4):
        times = []
        for quantizer in (hqq, ours):
            start = time.perf_counter()
            quantizer(weight, bits, 64)
            times.append(time.perf_counter() - start)
        print(f"| {bits} | {times[0]:.1f} | {times[1]:.1f} | {times[0] / times[1]:.1f} |", flush=True)


def uneven() -> None:
    """Prints the relative error of groups whose neighbor in a block of stored scales is larger."""
    print("\nrelative error of Gaussian groups of 64 beside one that is larger\n")
    print("| times as large | 2 bits | 4 bits | 8 bits |\n|---|---|---|---|")
    for times in (1, 10, 100):
        weight = torch.randn(8, 2048, generator=torch.Generator().manual_seed(0))
        weight[:, :64] *= times
        errors = [(ours(weight, bits, 64) - weight)[:, 64:].norm() / weight[:, 64:].norm() for bits in (2, 4, 8)]
        print(f"| {times} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")


@torch.no_grad()
def loss(run: Path) -> None:
    """Prints the increase in the demo model's loss when all experts are quantized."""
    from moe_precision.recipes import TextDataModule

    plan = PrecisionPlan.load(run / "precision_plan.json")
    data = TextDataModule(tokenizer=str(run / "checkpoint"), sequence_length=128, batch_size=32, max_train_tokens=1000)
    data.setup("validate")
    assert data.token_counts is not None
    batches = list(data.val_dataloader())
    model = load_model(run / "checkpoint", dtype=torch.float32)
    baseline = evaluate(model, batches, data.token_counts).loss
    layers = find_moe_layers(model)
    kept = [
        [{n: w.clone() for n, w in layer.expert_weights(e).items()} for e in range(layer.num_experts)]
        for layer in layers
    ]
    print(f"\nincrease of loss, all experts, group {plan.group_size}; float {baseline:.4f}\n")
    print("| bits | HQQ | ours, float16 scales | ours |\n|---|---|---|---|")
    for bits in (1, 2, 3, 4):
        increases = []
        for quantizer in (hqq, ours_float16, ours):
            for layer, experts in zip(layers, kept, strict=True):
                for expert, weights in enumerate(experts):
                    for name, view in layer.expert_weights(expert).items():
                        view.copy_(quantizer(weights[name], bits, plan.group_size))
            increases.append(evaluate(model, batches, data.token_counts).loss - baseline)
        print(f"| {bits} | " + " | ".join(f"{one:.5f}" for one in increases) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a demo run, for the loss")
    options = parser.parse_args()
    speed()
    uneven()
    if options.run:
        loss(options.run)
