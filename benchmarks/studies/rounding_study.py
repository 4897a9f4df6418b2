"""What the experts' statistics and distilled scales bring on the study's models, on own and on other text.

    python -m benchmarks.studies.rounding_study --output runs/study --workers 2
    python -m benchmarks.studies.rounding_study --output runs/study --report

The models are those of `study`, trained here if they are not there yet. Statistics come from training batches after the
last step. Other text is text that neither training nor statistics have seen, with the same tokenizer.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.studies.study_models import REFERENCE, Setting, folder_of, language_reference, merged, run, train
from moe_precision import allocate, collect_statistics, distill_scales, quantize_model, replan
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.files import replaced_when_done
from moe_precision.judging.evaluation import BANDS, frequency_bands
from moe_precision.judging.reference import Reference
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.beside import PlanFiles
from moe_precision.plans.plan import PrecisionPlan
from moe_precision.recipes import TextDataModule
from moe_precision.recording.curvature import Curvature

STATISTICS_ROWS = 512  # of 128 tokens
OTHER_TOKENS = 32768
UNIFORM = (1, 2, 3)
BUDGETS = (1.5, 2.0, 2.5)
STEPS = 100
NONE, ROUNDED, LAYERS, LOGITS = "no statistics", "statistics", "and distilled, layers", "and distilled, logits"


class RoundingStudy:
    """One trained model, and every way to quantize it.

    Args:
        study: The settings.
        name: The model's key in them.
        seed: Its seed.
        root: Folder of the study.
    """

    def __init__(self, study: Setting, name: str, seed: int, root: Path) -> None:
        data, folder = train(study, name, seed, root), folder_of(name, seed, root)
        self.group_size = study["models"][name]["group_size"]
        self.model: PreTrainedModel = load_model(folder / "checkpoint", dtype=torch.float32).eval()
        self.curvature = Curvature.load(PlanFiles.of(folder / "precision_plan.json").curvature)
        rows = data.hparams["batch_size"]
        self.training = list(islice(data.train_dataloader(), max(STATISTICS_ROWS // rows, STEPS + 8)))
        self.statistics = collect_statistics(self.model, self.training[: STATISTICS_ROWS // rows])
        layers = find_moe_layers(self.model)
        self.texts = {"own": Reference(self.model, merged(data.val_dataloader()), layers)}
        if isinstance(data, TextDataModule):
            used = study["models"][name]["data_args"].get("dataset")
            other = "python-stdlib" if used == REFERENCE else language_reference(root / "language_reference")
            text = TextDataModule(dataset=other, tokenizer=str(folder / "checkpoint"), max_val_tokens=OTHER_TOKENS)
            text.setup("validate")
            self.texts["other"] = Reference(self.model, merged(text.val_dataloader()), layers)
        self.bands = frequency_bands(self.texts["own"].targets, data.token_counts)
        self.results: list[dict[str, Any]] = []

    def plans(self) -> Iterator[tuple[str, PrecisionPlan]]:
        """All plans by name; those by curvature are as they were before there were statistics."""
        for bits in UNIFORM:
            uniform = allocate(self.model, method="uniform", average_bits=bits, group_size=self.group_size)
            yield f"uniform {bits}", uniform
        known = {"curvature": self.curvature, "group_size": self.group_size}
        asked = {"method": "statistics", "statistics": self.statistics, **known}
        measured = {  # once; a budget only solves the knapsack
            "curvature": allocate(self.model, method="curvature", **known),
            "uncalibrated": allocate(self.model, **asked),
            "statistics": allocate(self.model, **asked, calibration=self.training),
        }
        for budget in BUDGETS:
            for name, plan in measured.items():
                yield f"{name} {budget:g}", replan(plan, average_bits=budget)

    def measure(self) -> list[dict[str, Any]]:
        """Quantizes by every plan, with and without statistics, and distilled in both ways."""
        for name, plan in self.plans():
            self._add(name, NONE, plan, self._packed(plan, statistics=None))
            rounded = self._packed(plan, statistics=self.statistics)
            self._add(name, ROUNDED, plan, rounded)
            if name.startswith(("uniform", "statistics")):
                for fit, through in ((LAYERS, "layers"), (LOGITS, "logits")):
                    distilled = copy.deepcopy(rounded)
                    distill_scales(distilled, self.model, self.training, steps=STEPS, through=through)
                    self._add(name, fit, plan, distilled)
        return self.results

    def as_it_is(self) -> dict[str, Any]:
        """KL and losses of the live model with the weights that it has now, on every text."""
        found: dict[str, Any] = {}
        for text, reference in self.texts.items():
            measured = reference.measure(self.model)
            rise = (measured.losses - measured.float_losses).double()
            found[text] = {"kl": measured.divergence.kl, "loss": float(rise.mean())}
            if text == "own":
                found[text]["rare"] = float(rise[self.bands == BANDS.index("rare")].mean())
        return found

    def _packed(self, plan: PrecisionPlan, statistics: Any) -> Any:
        return quantize_model(copy.deepcopy(self.model), plan, curvature=self.curvature, statistics=statistics)

    def _add(self, name: str, fit: str, plan: PrecisionPlan, packed: Any) -> None:
        found: dict[str, Any] = {"plan": name, "fit": fit, "stored_bits": plan.stored_bits}
        for text, reference in self.texts.items():
            measured = reference.measure(packed)
            rise = (measured.losses - measured.float_losses).double()
            found[text] = {
                "kl": measured.divergence.kl,
                "kl_999": measured.divergence.kl_999,
                "top1": measured.divergence.top1,
                "loss": float(rise.mean()),
            }
            if text == "own":
                found[text]["rare"] = float(rise[self.bands == BANDS.index("rare")].mean())
        self.results.append(found)


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    result = folder_of(name, seed, root) / "rounding.json"
    if result.is_file():
        return f"{name} {seed}: found"
    one = RoundingStudy(study, name, seed, root)
    found = {"tokens": one.statistics.described(), "results": one.measure()}
    with replaced_when_done(result) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return f"{name} {seed}: done"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    from benchmarks.studies.rounding_report import report

    run(arguments, __doc__, "runs/study", lambda study: study["compared"], measure, report)


if __name__ == "__main__":
    main()
