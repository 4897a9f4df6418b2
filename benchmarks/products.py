"""One packed matrix against bfloat16: our C++ kernel and Intel's ARK, by width and number of tokens, as ratios.

    pip install -e .[cpu]     # ARK
    python -m benchmarks.products [--threads 1]

ARK computes in int8 on Intel's CPUs alone, and rows of other CPUs say nothing about it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from moe_precision.quantize import kernels
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.codec.packing import pack
from moe_precision.quantize.kernels import Kernel, Matrices
from moe_precision.quantize.kernels.ark import Ark
from moe_precision.quantize.kernels.native import Native

OUT, IN, GROUP = 4096, 2048, 128
WIDTHS, TOKENS = (2, 3, 4), (1, 8, 32, 512)


def seconds(product: Callable[[], object]) -> float:
    """Median time of a product."""
    timer = Timer("product()", globals={"product": product}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.4).median)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    torch.set_num_threads(parser.parse_args().threads)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    half = weight.bfloat16()
    head = ["bits", "tokens", "bf16, us", "C++ ÷ bf16", "ARK ÷ bf16", "ARK's error", "C++'s error"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for bits in WIDTHS:
        codes, scale, offset = quantize_matrix(weight, bits, GROUP)
        matrices = Matrices.of(pack(codes, bits)[None], scale[None], offset[None])
        exact = kernels.dequantize(matrices.codes, *matrices.floats(), bits, torch.float32)[0]
        both: list[Kernel] = [kind(matrices, bits, GROUP) for kind in (Native, Ark)]
        for tokens in TOKENS:
            x = torch.randn(tokens, IN).bfloat16()
            wanted = x.float() @ exact.T
            base = seconds(lambda x=x: torch.nn.functional.linear(x, half))  # type: ignore[misc]
            ratios = [seconds(lambda one=one, x=x: one.linear(0, x)) / base for one in both]  # type: ignore[misc]
            errors = [float((one.linear(0, x).float() - wanted).norm() / wanted.norm()) for one in both]
            cells = [f"{base * 1e6:.0f}", *(f"{ratio:.2f}" for ratio in ratios), f"{errors[1]:.1e}", f"{errors[0]:.1e}"]
            print(f"| {bits} | {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
