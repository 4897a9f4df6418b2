"""Annealing against quantizing the finished model with all that the quantizer knows: statistics and distilled scales.

    python -m benchmarks.studies.anneal_start --output runs/anneal --seeds 0 1
    python -m benchmarks.studies.anneal_start --output runs/anneal --report

The models of `anneal_study`, trained here if they are not there yet. Annealing takes the last tenth of the steps; the
finished model has had as many, all in float, and is what losses and KL are compared with. All plans are of levels 1 to
4 by expert and projection.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.studies.anneal_study import BEST, AnnealStudy
from benchmarks.studies.study_models import Setting, run
from benchmarks.studies.ways import kept, tables
from moe_precision import allocate, collect_statistics, distill_scales, quantize_model, replan
from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor
from moe_precision.judging.evaluation import BANDS, frequency_bands
from moe_precision.judging.reference import Reference
from moe_precision.layers.moe_layers import find_moe_layers

SHARE, BEFORE = 0.1, 0.2  # of all steps: annealed, and where runs begin, so that statistics can be recorded
ROWS, STEPS = 512, 100  # for statistics, and batches to distill on
ROUNDED, LAYERS, LOGITS = "afterwards", "afterwards, scales distilled", "afterwards, distilled through the logits"
NEAREST, STARTED = "annealed", "annealed, beginning on rounded codes"
FILE = "annealing_start.json"
COLUMNS = {"loss": "loss", "rare": "rare", "kl": "KL"}
HEADER = """# Tables of annealing and quantizing afterwards

Printed by `python -m benchmarks.studies.anneal_start --report`. Loss is the increase over the finished float model,
which has had as many steps, in nats per token, *rare* that on the rarest tenth of the target tokens, and KL the
divergence from its predictions. Entries are means over seeds ± half of the 95 % interval; of one or two seeds, means
alone.
"""


class AnnealStart(AnnealStudy):
    """One model and seed; arguments as of `AnnealStudy`."""

    def __init__(self, study: Setting, name: str, seed: int, root: Path) -> None:
        settings = {**study["annealing"], "shares": [SHARE, BEFORE]}
        super().__init__({**study, "annealing": settings}, name, seed, root)

    def measure(self) -> list[dict[str, Any]]:
        """Every way at every budget."""
        monitor = self.monitor()
        finished = self.finish(BEFORE, monitor).eval()
        self.compare_with(finished)
        self.quantized(finished, monitor, {ROUNDED: "", LAYERS: "layers", LOGITS: "logits"})
        for way, steps in ((NEAREST, 0), (STARTED, max(32, self.starts[SHARE] // 20))):
            self.annealing(way, PrecisionAnneal, statistics_steps=steps)
        return self.found

    def compare_with(self, finished: Any) -> None:
        """Sets the float model that all others are compared with."""
        self.reference = Reference(finished, self.batches, find_moe_layers(finished))
        self.bands = frequency_bands(self.reference.targets, self.data.token_counts)
        self.found: list[dict[str, Any]] = []

    def add(self, way: str, budget: float, model: Any, stored: float) -> None:
        """Measures a model."""
        measured = self.reference.measure(model.eval())
        rise = (measured.losses - measured.float_losses).double()
        rare = float(rise[self.bands == BANDS.index("rare")].mean())
        result = {"loss": float(rise.mean()), "rare": rare, "kl": measured.divergence.kl}
        self.found.append({"way": way, "budget": budget, "stored_bits": stored, **result})

    @property
    def asked(self) -> Setting:
        """Levels and group size of all plans."""
        return {"bits": self.settings["bits"], "group_size": self.model["group_size"]}

    def quantized(self, finished: Any, monitor: RouterNormMonitor, ways: Mapping[str, str]) -> None:
        """Measures a finished model that is rounded under statistics, as it is or with distilled scales.

        Args:
            finished: The float model.
            monitor: Of its training.
            ways: Name of each way -> what its scales are distilled through; empty for none.
        """
        rows = list(islice(self.data.train_dataloader(), max(ROWS // self.data.hparams["batch_size"], STEPS + 8)))
        statistics = collect_statistics(finished, rows[: ROWS // self.data.hparams["batch_size"]])
        known = {"curvature": monitor.curvature, "statistics": statistics}
        asked = {"average_bits": self.settings["budgets"][0], **self.asked}
        priced = allocate(finished, method="statistics", calibration=rows, **asked, **known)
        for budget in self.settings["budgets"]:
            plan = replan(priced, average_bits=budget)
            packed = quantize_model(copy.deepcopy(finished), plan, **known)
            for way, through in ways.items():
                model = copy.deepcopy(packed)
                if through:
                    distill_scales(model, finished, rows, steps=STEPS, through=through)
                self.add(way, budget, model, plan.stored_bits)

    def annealing(self, way: str, callback: type[PrecisionAnneal], **settings: Any) -> None:
        """Measures the last share of the steps on the grid."""
        for budget in self.settings["budgets"]:
            anneal = callback(start=self.starts[SHARE], average_bits=budget, **self.asked, **BEST, **settings)
            model = self.finish(BEFORE, self.monitor(), anneal)
            assert anneal.plan is not None
            self.add(way, budget, model, anneal.plan.stored_bits)


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    return kept(name, seed, root, FILE, lambda: AnnealStart(study, name, seed, root).measure())


def report(study: Setting, root: Path) -> str:
    """All tables as Markdown."""
    ways = [
        (budget, way) for budget in study["annealing"]["budgets"] for way in (ROUNDED, LAYERS, LOGITS, NEAREST, STARTED)
    ]
    return tables(study, root, FILE, HEADER, ways, COLUMNS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    run(arguments, __doc__, "runs/anneal", lambda study: study["annealing"]["models"], measure, report)


if __name__ == "__main__":
    main()
