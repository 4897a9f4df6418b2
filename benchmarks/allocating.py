"""The allocator's knapsack at full size: 64 layers x 256 experts x 5 widths, against its linear-programming bound.

python -m benchmarks.allocating
"""

from __future__ import annotations

import time

import numpy as np

from moe_precision.allocation.knapsack import choose, greedy

LAYERS, EXPERTS, WIDTHS = 64, 256, (1, 2, 3, 4, 8)
WEIGHTS = 3 * 7168 * 2048  # of an expert


def main() -> None:
    """Prints times and gaps for costs that fall with the width as squared errors do, over orders of magnitude."""
    generator = np.random.default_rng(0)
    layer = generator.lognormal(0, 1, (LAYERS, 1, 1))
    expert = generator.lognormal(0, 1, (LAYERS, EXPERTS, 1))
    noise = generator.uniform(0.8, 1.25, (LAYERS, EXPERTS, len(WIDTHS)))
    costs = (layer * expert * noise * 4.0 ** -np.array(WIDTHS)).reshape(-1, len(WIDTHS))
    sizes = np.tile(np.array(WIDTHS) * WEIGHTS, (LAYERS * EXPERTS, 1))
    print(f"{LAYERS} layers x {EXPERTS} experts x {len(WIDTHS)} widths\n")
    print("| average bits | exact, s | above the bound, % | greedy, s | above the bound, % |\n|---|---|---|---|---|")
    for average in (2.0, 2.25, 2.5, 3.0):
        budget = int(average * WEIGHTS) * LAYERS * EXPERTS
        start = time.perf_counter()
        exact = choose(costs, sizes, budget)
        middle = time.perf_counter()
        approximate = greedy(costs, sizes, budget)
        end = time.perf_counter()
        bound = approximate.cost / (1 + approximate.gap)
        gaps = (100 * max(0.0, exact.cost / bound - 1), 100 * approximate.gap)
        print(f"| {average} | {middle - start:.1f} | {gaps[0]:.5f} | {end - middle:.1f} | {gaps[1]:.5f} |", flush=True)


if __name__ == "__main__":
    main()
