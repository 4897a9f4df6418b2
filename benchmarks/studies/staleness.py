"""Statistics recorded in the last 5 % of training, against those taken after the last step: KL to the float model.

    python -m benchmarks.studies.staleness [--output runs/staleness] [--model mixtral] [--seeds 0 1]

A model of the study is trained once per seed with `statistics_from=0.95`; after its last step statistics are taken from
32 batches, and from as many as give an expert the tokens that training gave it. Experts are quantized to 2 and 3 bits.
"""

import argparse
import copy
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.studies.study_models import (
    Setting,
    data_of,
    folder_of,
    language_reference,
    merged,
    module_of,
    settings_of,
    trainer_of,
)
from moe_precision import allocate, quantize_model
from moe_precision.callbacks import RouterNormMonitor, SavePretrained
from moe_precision.checkpoints import load_model
from moe_precision.judging.reference import Reference
from moe_precision.plans.beside import PlanFiles
from moe_precision.recipes import TextDataModule
from moe_precision.recording.collecting import collect_statistics
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.statistics import ExpertStatistics

AFTER = 32  # batches, the default of the callbacks


def median_tokens(statistics: ExpertStatistics) -> int:
    """Of all experts."""
    return int(torch.cat(list(statistics.tokens.values())).median())


def trained(study: Setting, name: str, seed: int, root: Path) -> Any:
    """Trains one model unless its files exist; returns its data module."""
    data, folder = data_of(study, name, seed, root), folder_of(name, seed, root)
    if not (folder / "checkpoint" / "config.json").is_file():
        pl.seed_everything(seed, verbose=False)
        group_size = study["models"][name]["group_size"]
        monitor = RouterNormMonitor(method="router_norm", group_size=group_size, statistics_from=0.95)
        trainer = trainer_of(study, name, folder, [monitor, SavePretrained()])
        trainer.fit(module_of(study, name, seed, root), datamodule=data)
    return data


def compare(study: Setting, name: str, seed: int, root: Path) -> None:
    """Prints the rows of one model and seed."""
    data, folder = trained(study, name, seed, root), folder_of(name, seed, root)
    files, group_size = PlanFiles.of(folder / "precision_plan.json"), study["models"][name]["group_size"]
    model = load_model(folder / "checkpoint", dtype=torch.float32).eval()
    curvature = Curvature.load(files.curvature)
    text = TextDataModule(
        dataset=language_reference(root / "language_reference"),
        tokenizer=str(folder / "checkpoint"),
        max_val_tokens=32768,
    )
    text.setup("validate")
    references = [Reference(model, merged(one.val_dataloader())) for one in (data, text)]
    during = ExpertStatistics.load(files.statistics)
    after = collect_statistics(model, list(islice(data.train_dataloader(), AFTER)))
    share = median_tokens(during) / median_tokens(after)
    as_many = collect_statistics(model, list(islice(data.train_dataloader(), max(1, round(share * AFTER)))))
    known = {
        "none": None,
        "of the last 5 % of training": during,
        "after the last step, as many tokens": as_many,
        f"after the last step, {AFTER} batches": after,
    }
    for what, statistics in known.items():
        cells = [str(seed), what, "" if statistics is None else f"{median_tokens(statistics):,}"]
        for bits in (2, 3):
            plan = allocate(model, method="uniform", average_bits=bits, group_size=group_size)
            packed = quantize_model(copy.deepcopy(model), plan, curvature=curvature, statistics=statistics)
            cells.append(", ".join(f"{reference.measure(packed).divergence.kl:.4f}" for reference in references))
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/staleness"), help="folder")
    parser.add_argument("--model", default="mixtral", help="of study.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| seed | statistics | tokens of the median expert | 2 bits: own text, other text | 3 bits |")
    print("|---|---|---|---|---|")
    for seed in options.seeds:
        compare(settings_of(None), options.model, seed, options.output)


if __name__ == "__main__":
    main()
