"""What it costs to round 16-bit activations to int8: KL to the float model, with and without, on the demo's model.

    python -m benchmarks.activations [--run runs/demo]

The model is in bfloat16, its experts at one width, rounded under their statistics; the float model is in float32.
Without a kernel in int8 both columns are alike.
"""

import argparse
import copy
from pathlib import Path

import torch

from benchmarks.peers import GROUP_SIZE, text_of
from benchmarks.studies.study_models import merged
from moe_precision import allocate, quantize_model, set_activations
from moe_precision.checkpoints import load_model
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles

WIDTHS = (1, 2, 3, 4)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    run = parser.parse_args().run
    model = load_model(run / "checkpoint", dtype=torch.float32)
    reference = Reference(model, merged(text_of(str(run / "checkpoint")).val_dataloader()))
    files = PlanFiles.of(run / "precision_plan.json")
    half = copy.deepcopy(model).bfloat16()
    print(f"float model in bfloat16: KL {reference.measure(half).divergence.kl:.5f}\n")
    print("| bits | KL, activations in int8 | in bfloat16 | kernel |\n|---|---|---|---|")
    for bits in WIDTHS:
        plan = allocate(model, method="uniform", average_bits=bits, group_size=GROUP_SIZE)
        packed = quantize_model(copy.deepcopy(half), plan, curvature=files.curvature, statistics=files.statistics)
        rounded = reference.measure(packed).divergence.kl
        kernels = sorted({text.split(",")[0] for text in packed.moe_precision_kernels().values()})
        set_activations(packed, "bfloat16")
        print(f"| {bits} | {rounded:.5f} | {reference.measure(packed).divergence.kl:.5f} | {', '.join(kernels)} |")


if __name__ == "__main__":
    main()
