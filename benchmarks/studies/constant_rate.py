"""Annealing in a run at a constant learning rate, with and without a cooldown, against quantizing afterwards.

    python -m benchmarks.studies.constant_rate --output runs/constant_rate --seeds 0
    python -m benchmarks.studies.constant_rate --output runs/constant_rate --report

All runs take the same steps over the same batches, the last tenth annealed or not. The float model is also finished
with a cooldown of its own and quantized then: without it, annealing would win by what the cooldown alone brings.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from benchmarks.studies.anneal_start import BEFORE, COLUMNS, LOGITS, NEAREST, ROUNDED, SHARE, AnnealStart
from benchmarks.studies.study_models import Setting, run
from benchmarks.studies.ways import kept, tables
from moe_precision.callbacks import PrecisionAnneal
from moe_precision.callbacks.rate_cooldown import RateCooldown

COOLED, COOLED_ROUNDED, COOLED_LOGITS = "float, cooldown", "cooldown, then " + ROUNDED, "cooldown, then " + LOGITS
ANNEALED, LINEAR = "annealed with a cooldown (1 - sqrt)", "annealed with a cooldown (linear)"
FILE = "constant_rate.json"
HEADER = """# Tables of annealing at a constant learning rate

Printed by `python -m benchmarks.studies.constant_rate --report`. Loss is the increase in nats per token over the float
model that had as many steps at the constant rate, *rare* that on the rarest tenth of the target tokens, and KL the
divergence from its predictions. Entries are means over seeds ± half of the 95 % interval; of one or two seeds, means
alone. A cooldown takes the last tenth of the steps, and can take the loss below that of the float model.
"""


def linear(done: int, steps: int) -> float:
    """A factor of the rate that falls evenly."""
    return 1 - done / steps


class LinearCooldown(PrecisionAnneal):
    """`PrecisionAnneal` with a cooldown of another form."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, cooldown=True)
        self._cooldown.shape = linear


class FloatCooldown(pl.Callback):
    """The same cooldown without a grid, from a step on."""

    def __init__(self, start: int) -> None:
        self._start, self._cooldown = start, RateCooldown("FloatCooldown", True)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if (done := trainer.global_step - self._start) >= 0:
            self._cooldown.before_step(trainer.optimizers, done, trainer.max_steps - self._start)

    def on_train_end(self, *args: Any) -> None:
        self._cooldown.close()


class ConstantRate(AnnealStart):
    """One model and seed; arguments as of `AnnealStudy`."""

    def measure(self) -> list[dict[str, Any]]:
        """Every way at every budget."""
        monitor = self.monitor()
        finished = self.finish(BEFORE, monitor).eval()
        self.compare_with(finished)
        self.quantized(finished, monitor, {ROUNDED: "", LOGITS: "logits"})
        monitor = self.monitor()
        cooled = self.finish(BEFORE, monitor, FloatCooldown(self.starts[SHARE])).eval()
        self.add(COOLED, 16, copy.deepcopy(cooled), 16)
        self.quantized(cooled, monitor, {COOLED_ROUNDED: "", COOLED_LOGITS: "logits"})
        self.annealing(NEAREST, PrecisionAnneal)
        self.annealing(ANNEALED, PrecisionAnneal, cooldown=True)
        self.annealing(LINEAR, LinearCooldown)
        return self.found


def with_models(study: Setting) -> Setting:
    """The settings of this study, with its models in the place of those that are annealed."""
    own = study["constant_rate"]
    settings = {**study["annealing"], **own, "models": list(own["models"])}
    return {**study, "models": own["models"], "annealing": settings}


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    return kept(name, seed, root, FILE, lambda: ConstantRate(with_models(study), name, seed, root).measure())


def report(study: Setting, root: Path) -> str:
    """All tables as Markdown."""
    study = with_models(study)
    ways = (ROUNDED, LOGITS, COOLED_ROUNDED, COOLED_LOGITS, NEAREST, ANNEALED, LINEAR)
    rows = [(budget, way) for budget in study["annealing"]["budgets"] for way in ways]
    return tables(study, root, FILE, HEADER, [*rows, (16, COOLED)], COLUMNS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    run(arguments, __doc__, "runs/constant_rate", lambda study: study["constant_rate"]["models"], measure, report)


if __name__ == "__main__":
    main()
