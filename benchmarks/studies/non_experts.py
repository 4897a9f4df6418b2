"""What statistics of their inputs bring the linear layers outside of experts: KL to the float model, on two texts.

    python -m benchmarks.studies.non_experts [--run runs/demo]

Attention's layers are quantized to 8 and 4 bits, beside experts that stay float and experts at 2 bits under the run's
own statistics, with and without the second moments of their own inputs from 32 batches of the run's text.
"""

import argparse
import copy
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from benchmarks.peers import text_of
from benchmarks.studies.study_models import language_reference, merged
from moe_precision import PrecisionPlan, find_moe_layers, quantize_model
from moe_precision.checkpoints import load_model
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles
from moe_precision.quantize.replace import non_expert_linears
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.linear_inputs import LinearInputs
from moe_precision.recording.statistics import ExpertStatistics

BATCHES = 32


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `make demo`")
    run = parser.parse_args().run
    checkpoint = str(run / "checkpoint")
    model = load_model(checkpoint, dtype=torch.float32)
    own = text_of(checkpoint, max_train_tokens=1_500_000)
    with tempfile.TemporaryDirectory() as topics:
        texts = own, text_of(checkpoint, dataset=language_reference(Path(topics)))
        references = [Reference(model, merged(text.val_dataloader())) for text in texts]
    linears = non_expert_linears(model, find_moe_layers(model))
    batches = list(islice(own.train_dataloader(), BATCHES))
    known = collect_statistics(model, batches, linears=linears)
    known = replace(ExpertStatistics.load(PlanFiles.of(run / "precision_plan.json").statistics), linears=known.linears)
    plan = PrecisionPlan.load(run / "precision_plan.json").widths_only()
    print("| experts at | other linear layers at | without statistics of theirs | with |")
    print("|---|---|---|---|")
    for bits, name in ((16, "16 bits"), (2, "2 bits")):
        uniform = plan.with_bits({layer: [bits] * one.shape.num_experts for layer, one in plan.layers.items()})
        for others in (8, 4):
            cells = []
            for given in (replace(known, linears=LinearInputs()), known):
                packed = quantize_model(copy.deepcopy(model), uniform, non_expert_bits=others, statistics=given)
                kls = (reference.measure(packed).divergence.kl for reference in references)
                cells.append(", ".join(f"{kl:.5f}" for kl in kls))
            print(f"| {name} | {others} bits | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
