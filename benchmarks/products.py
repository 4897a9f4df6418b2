"""One packed matrix against bfloat16: our C++ kernels and Intel's ARK, by width and number of tokens, as ratios.

    pip install -e .[cpu]     # ARK
    python -m benchmarks.products [--threads 1]

Times are of the CPU, so that other work on the machine matters little. ARK computes in int8 on Intel's CPUs alone; on
others it is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from moe_precision.quantize import kernels
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.quantize.codec.packing import pack
from moe_precision.quantize.kernels import Kernel, Matrices, Request
from moe_precision.quantize.kernels.ark import Ark
from moe_precision.quantize.kernels.native import Native, NativeInt8

OUT, IN, GROUP = 4096, 2048, 128
WIDTHS, TOKENS = (2, 3, 4), (1, 8, 32, 512)


def seconds(product: Callable[[], object]) -> float:
    """Median CPU time of a product."""
    product()
    found = []
    for _ in range(9):
        start, count = time.process_time(), 0
        while (spent := time.process_time() - start) < 0.05:
            product()
            count += 1
        found.append(spent / count)
    return sorted(found)[4]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    torch.set_num_threads(parser.parse_args().threads)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    half = weight.bfloat16()
    tried: list[type[Kernel]] = [Native, NativeInt8, Ark]
    kinds = [kind for kind in tried if kind.fits(Request("cpu", torch.bfloat16, False, 2, OUT, IN, GROUP))]
    head = ["bits", "tokens", "bf16, us", *(f"{kind.name} ÷ bf16" for kind in kinds)]
    head += [f"error, {kind.name}" for kind in kinds]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for bits in WIDTHS:
        codes, scale, offset = quantize_matrix(weight, bits, GROUP)
        matrices = Matrices.of(pack(codes, bits)[None], scale[None], offset[None])
        exact = kernels.dequantize(matrices.codes, *matrices.floats(), bits, torch.float32)[0]
        all_of_them = [kind(matrices, bits, GROUP) for kind in kinds]
        for tokens in TOKENS:
            x = torch.randn(tokens, IN).bfloat16()
            wanted = x.float() @ exact.T
            base = seconds(lambda x=x: torch.nn.functional.linear(x, half))  # type: ignore[misc]
            ratios = [seconds(lambda one=one, x=x: one.linear(0, x)) / base for one in all_of_them]  # type: ignore[misc]
            errors = [float((one.linear(0, x).float() - wanted).norm() / wanted.norm()) for one in all_of_them]
            cells = [f"{base * 1e6:.0f}", *(f"{ratio:.2f}" for ratio in ratios), *(f"{of:.1e}" for of in errors)]
            print(f"| {bits} | {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
