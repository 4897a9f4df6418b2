"""What an expert's statistics bring by how often it is used: those of training text against 128 sequences.

    python -m benchmarks.studies.cold_experts [--output runs/study] [--seeds 0 1]

The study's model of 64 experts of uneven load. In every layer the experts are sorted by their load and cut into four
groups; one group is quantized to 2 bits while all others stay float. Statistics are of 128 sequences of 128 tokens, as
tools that calibrate a finished checkpoint take them, with and without the shrinkage that moves rarely seen experts'
second moments to their diagonal; of 32 training batches, which a run records unasked; and of 128.
"""

import argparse
import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from benchmarks.studies.study_models import Setting, folder_of, merged, rows_of, settings_of, train
from moe_precision import allocate, quantize_model
from moe_precision.checkpoints import load_model
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles
from moe_precision.recording import packed_moments
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.curvature import Curvature

GROUPS = "least used quarter", "second quarter", "third quarter", "most used quarter", "all"
SEQUENCES, FEW, MANY = 128, 32, 128


@contextmanager
def without_shrinkage() -> Iterator[None]:
    """Inside, second moments are taken as they are, however few tokens they rest on."""
    kept, packed_moments.SHRINK = packed_moments.SHRINK, 0.0
    try:
        yield
    finally:
        packed_moments.SHRINK = kept


def compare(study: Setting, name: str, seed: int, root: Path) -> None:
    """Prints the rows of one seed."""
    data, folder = train(study, name, seed, root), folder_of(name, seed, root)
    model = load_model(folder / "checkpoint", dtype=torch.float32).eval()
    curvature = Curvature.load(PlanFiles.of(folder / "precision_plan.json").curvature)
    reference = Reference(model, merged(data.val_dataloader()))
    batches = list(islice(data.train_dataloader(), MANY))
    many = collect_statistics(model, batches)
    few = collect_statistics(model, batches[:FEW])
    sequences = collect_statistics(model, list(rows_of(batches, SEQUENCES, len(batches[0]["labels"]))))
    float_plan = allocate(model, method="uniform", bits=(16,), average_bits=16, group_size=64)
    quarter = {layer: tokens.argsort().chunk(4) for layer, tokens in many.tokens.items()}
    for number, what in enumerate(GROUPS):
        chosen = {layer: parts[number] if number < 4 else torch.cat(parts) for layer, parts in quarter.items()}
        plan = float_plan.with_bits(
            {layer: [2 if e in of.tolist() else 16 for e in range(64)] for layer, of in chosen.items()}
        )
        cells = [str(seed), what]
        for known in (sequences, many):
            seen = torch.cat([known.tokens[layer][of] for layer, of in chosen.items()])
            cells.append(f"{int(seen.median()):,}")
        for known, shrinks in ((None, True), (sequences, False), (sequences, True), (few, True), (many, True)):
            if shrinks:
                packed = quantize_model(copy.deepcopy(model), plan, curvature=curvature, statistics=known)
            else:
                with without_shrinkage():
                    packed = quantize_model(copy.deepcopy(model), plan, curvature=curvature, statistics=known)
            cells.append(f"{reference.measure(packed).divergence.kl:.5f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"| seed | experts at 2 bits | median tokens: {SEQUENCES} sequences | {MANY} batches | KL without | "
        f"{SEQUENCES} sequences, no shrinkage | {SEQUENCES} sequences | {FEW} batches | {MANY} batches |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        compare(settings_of(None), "uneven", seed, options.output)


if __name__ == "__main__":
    main()
