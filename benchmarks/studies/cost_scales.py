"""How well costs by statistics predict measured divergence: by expert within a projection, and between projections.

    python -m benchmarks.studies.cost_scales --output runs/study --models mixtral --seeds 0

For a model of `study` (trained here if it is not there yet) every expert matrix is quantized alone, and all experts of
each projection together, at 1 to 4 bits, and the divergence from the float model is measured on training batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.studies.rounding_study import RoundingStudy
from benchmarks.studies.study_models import Setting, folder_of, merged, run
from benchmarks.studies.study_report import markdown_table
from moe_precision.files import replaced_when_done
from moe_precision.judging.reference import Reference
from moe_precision.judging.simulation import SimulatedExperts
from moe_precision.judging.statistics import rank_correlation
from moe_precision.layers.moe_layers import find_moe_layers

BATCHES, WIDTHS = 16, (1, 2, 3, 4)
HEADER = """# Costs against what was measured

Printed by `python -m benchmarks.studies.cost_scales --report`. Every expert matrix quantized alone, and all of a
projection together; divergence on 16 training batches, a row for each seed and width.

"""


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Measures one model and seed, unless its result exists; returns what was done."""
    result = folder_of(name, seed, root) / "cost_scales.json"
    if result.is_file():
        return f"{name} {seed}: found"
    one = RoundingStudy(study, name, seed, root)
    layers = find_moe_layers(one.model)
    reference = Reference(one.model, merged(one.training[:BATCHES]), layers)

    def divergence() -> float:
        return float(reference.measure(one.model).divergence.kl)

    rows = []
    with SimulatedExperts(layers, WIDTHS, one.group_size, one.curvature, statistics=one.statistics) as experts:
        costs = experts.costs(WIDTHS, one.curvature, together=True)
        alone = experts.sensitivity(WIDTHS, divergence)
        for layer in layers:
            for projection in layer.banks:
                for index, bits in enumerate(WIDTHS):
                    experts.restore()
                    experts.apply({layer.name: {projection: [bits] * layer.num_experts}})
                    predicted, measured = (of[layer.name][projection][:, index] for of in (costs, alone))
                    row = {"place": f"{layer.name} {projection}", "bits": bits, "together": divergence()}
                    rows.append({**row, "predicted": predicted.tolist(), "alone": measured.tolist()})
    with replaced_when_done(result) as temporary:
        temporary.write_text(json.dumps(rows), encoding="utf-8")
    return f"{name} {seed}: done"


def report(study: Setting, root: Path) -> str:
    """For each width: rank correlations with what was measured, and how the measured divides by the predicted."""
    table = []
    for name in study["models"]:
        for path in sorted((root / name).glob("seed_*/cost_scales.json")):
            rows = json.loads(path.read_text(encoding="utf-8"))
            of_two = [row["together"] / sum(row["predicted"]) for row in rows if row["bits"] == 2]
            unit = sorted(of_two)[len(of_two) // 2]
            for bits in WIDTHS:
                chosen = [row for row in rows if row["bits"] == bits]
                within = [_rank(row["predicted"], row["alone"]) for row in chosen]
                over_all = _rank(*([x for row in chosen for x in row[key]] for key in ("predicted", "alone")))
                scales = [row["together"] / sum(row["predicted"]) / unit for row in chosen]
                ranks = f"{min(within):.2f} to {max(within):.2f}"
                table.append([name, str(bits), ranks, f"{over_all:.2f}", f"{min(scales):.2f} to {max(scales):.2f}"])
    head = ["model", "bits", "rank correlation within a projection", "over all", "measured ÷ predicted, by projection"]
    title = "Costs by statistics against measured divergence (a ratio of 1: the median at 2 bits)"
    return HEADER + markdown_table(title, head, table)


def _rank(one: Sequence[float], other: Sequence[float]) -> float:
    return rank_correlation(torch.tensor(one), torch.tensor(other))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or print the table."""
    run(arguments, __doc__, "runs/study", lambda study: ["mixtral", "mixtral_finetuned"], measure, report)


if __name__ == "__main__":
    main()
