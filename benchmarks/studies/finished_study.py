"""A finished model on its plan: 200 more steps towards the labels, a teacher or both, against quantizing it as it is.

    python -m benchmarks.studies.finished_study --output runs/finished --seeds 0 1
    python -m benchmarks.studies.finished_study --output runs/finished --report

The models of `anneal_study`, trained here if they are not there yet. Steps are as in recipes/recover.yaml; the teacher
is the finished model itself. Plans are of levels 1 to 4 by expert and projection, made once from the finished model.
"""

import copy
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.studies.study_models import Setting, data_of, folder_of, merged, run, train, trainer_of
from benchmarks.studies.ways import kept, tables
from moe_precision import allocate, collect_statistics, distill_scales, quantize_model, recipes, replan
from moe_precision.callbacks import PrecisionAnneal
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.judging.evaluation import BANDS, frequency_bands
from moe_precision.judging.reference import Reference
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.beside import PlanFiles
from moe_precision.recording.curvature import Curvature

ROWS, BATCHES = 512, 100  # for statistics, and batches to distill scales on
ROUNDED, LOGITS = "as it is", "as it is, scales distilled through the logits"
WAYS: dict[str, Setting] = {
    "labels": {},
    "labels and teacher": {"teacher_weight": 0.5},
    "teacher": {"teacher_weight": 1.0},
    "teacher, beginning on rounded codes": {"teacher_weight": 1.0, "statistics_steps": 1},
}
FLOAT = "labels, in float"
HEADER = """# Tables of finished models that get more steps on their plan

Printed by `python -m benchmarks.studies.finished_study --report`. Loss is the increase over the finished float model in
nats per token, *rare* that on the rarest tenth of the target tokens, KL the divergence from its predictions, *top-1*
how often its most likely token stays, and *same experts* the share of tokens that go to the same experts in all layers.
Entries are means over seeds ± half of the 95 % interval; of one or two seeds, means alone.
"""
FILE = "finished.results.json"
COLUMNS = {"loss": "loss", "rare": "rare", "kl": "KL", "top1": "top-1", "same_experts": "same experts"}


class FinishedStudy:
    """One model and seed.

    Args:
        study: The settings.
        name: The model's key in them.
        seed: Its seed.
        root: Folder of the study.
    """

    def __init__(self, study: Setting, name: str, seed: int, root: Path) -> None:
        self.study, self.name, self.seed = study, name, seed
        self.settings, self.model = study["annealing"], study["models"][name]
        self.folder = folder_of(name, seed, root)
        train(study, name, seed, root)
        self.data = data_of(study, name, seed, root)
        self.finished = load_model(self.folder / "checkpoint", dtype=torch.float32).eval()
        batches = merged(self.data.val_dataloader())
        self.reference = Reference(self.finished, batches, find_moe_layers(self.finished))
        self.bands = frequency_bands(self.reference.targets, self.data.token_counts)

    def measured(self, model: Any) -> dict[str, float | None]:
        """How far a model is from the finished one."""
        found = self.reference.measure(model.eval())
        rise, far = (found.losses - found.float_losses).double(), found.divergence
        rare = float(rise[self.bands == BANDS.index("rare")].mean())
        return {
            "loss": float(rise.mean()),
            "rare": rare,
            **{key: getattr(far, key) for key in ("kl", "top1", "same_experts")},
        }

    def trained(self, plan: Path | None, **settings: Any) -> Any:
        """The finished model after more steps, on a plan or in float."""
        pl.seed_everything(self.seed, verbose=False)
        recover, checkpoint = self.settings["recover"], str(self.folder / "checkpoint")
        module = getattr(recipes, self.model["module"])(
            checkpoint=checkpoint, learning_rate=recover["learning_rate"], warmup_steps=recover["warmup_steps"]
        )
        if "teacher_weight" in settings:
            settings["teacher"] = checkpoint
        callbacks = [] if plan is None else [PrecisionAnneal(start=0, plan=str(plan), **settings)]
        trainer = trainer_of(self.study, self.name, self.folder / "last", callbacks, max(recover["steps"]))
        trainer.fit(module, datamodule=self.data)
        return module.model

    def measure(self) -> list[dict[str, Any]]:
        """Every way at every budget."""
        results: list[dict[str, Any]] = [{"way": FLOAT, "budget": 16, **self.measured(self.trained(None))}]
        pl.seed_everything(self.seed, verbose=False)
        size = self.data.hparams["batch_size"]
        rows = list(islice(self.data.train_dataloader(), max(ROWS // size, BATCHES + 8)))
        statistics = collect_statistics(self.finished, rows[: ROWS // size])
        curvature = Curvature.load(PlanFiles.of(self.folder / "precision_plan.json").curvature)
        known = {"curvature": curvature, "statistics": statistics}
        asked = {"bits": self.settings["bits"], "group_size": self.model["group_size"]}
        priced = allocate(self.finished, method="statistics", calibration=rows, **asked, **known)
        files = PlanFiles.of(self.folder / "finished.json")
        curvature.save(files.curvature)
        statistics.save(files.statistics)
        for budget in self.settings["budgets"]:
            plan = replan(priced, average_bits=budget)
            plan.save(files.plan)
            packed = quantize_model(copy.deepcopy(self.finished), plan, **known)
            results.append({"way": ROUNDED, "budget": budget, **self.measured(packed)})
            distill_scales(packed, self.finished, rows, steps=BATCHES, through="logits")
            results.append({"way": LOGITS, "budget": budget, **self.measured(packed)})
            for way, settings in WAYS.items():
                model = self.trained(files.plan, **settings)
                results.append({"way": way, "budget": budget, **self.measured(model)})
        return results


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    return kept(name, seed, root, FILE, lambda: FinishedStudy(study, name, seed, root).measure())


def report(study: Setting, root: Path) -> str:
    """All tables as Markdown."""
    ways = [(budget, way) for budget in study["annealing"]["budgets"] for way in (ROUNDED, LOGITS, *WAYS)]
    return tables(study, root, FILE, HEADER, [*ways, (16, FLOAT)], COLUMNS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    run(arguments, __doc__, "runs/finished", lambda study: study["annealing"]["models"], measure, report)


if __name__ == "__main__":
    main()
