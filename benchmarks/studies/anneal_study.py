"""The study of annealing behind docs/evidence.md: training that ends on a plan against quantizing afterwards.

    python -m benchmarks.studies.anneal_study --output runs/anneal --workers 2
    python -m benchmarks.studies.anneal_study --output runs/anneal --report

Trains what `annealing` in study.yaml says, keeps whole checkpoints shortly before the end, and takes the last steps of
each in every way. All of them, the float control too, continue from the same checkpoint over the same batches. Every
result is kept, so an interrupted study resumes where it stopped.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks.studies.anneal_scales import LearnedScales, RefittedScales
from benchmarks.studies.study_models import (
    Setting,
    checkpoint_at,
    data_of,
    folder_of,
    merged,
    module_of,
    monitor_of,
    run,
    train,
    trainer_of,
)
from moe_precision import recipes
from moe_precision.allocation.allocator import allocate
from moe_precision.callbacks import PrecisionAnneal, RouterNormMonitor
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.files import replaced_when_done
from moe_precision.judging.evaluation import BANDS, document_losses, frequency_bands
from moe_precision.judging.simulation import SimulatedExperts
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.beside import PlanFiles
from moe_precision.plans.plan import PrecisionPlan
from moe_precision.quantize import quantize_model

PLANS = ("curvature", "router_norm", "reversed", "random")
BEST: Setting = {"method": "curvature", "granularity": "expert+projection"}


class RoutersOnly(PrecisionAnneal):
    """Quantizes the experts at ``start`` and trains only routers from then on."""

    def _begin(self, model: nn.Module, *args: Any) -> None:
        super()._begin(model, *args)
        assert self._hooks is not None
        self._hooks.settle()
        self._hooks.close()
        model.requires_grad_(False)
        for layer in find_moe_layers(model):
            layer.router_weight().requires_grad_(True)

    def _after_step(self, step: int) -> None:
        """The experts do not go through a grid: they are on it."""


class AnnealStudy:
    """One model and seed: its checkpoints before the end, and every way of taking the last steps.

    Args:
        study: The settings.
        name: The model's key in them.
        seed: Its seed.
        root: Folder of the study.
    """

    def __init__(self, study: Setting, name: str, seed: int, root: Path) -> None:
        self.study, self.name, self.seed, self.root = study, name, seed, root
        self.settings, self.model = study["annealing"], study["models"][name]
        self.folder = folder_of(name, seed, root)
        self.starts = {share: self.model["max_steps"] - self.steps(share) for share in self.settings["shares"]}
        train(study, name, seed, root, list(self.starts.values()))
        self.data = data_of(study, name, seed, root)
        self.batches = merged(self.data.val_dataloader())
        self._file = self.folder / "annealing.json"
        self.results: dict[str, Any] = json.loads(self._file.read_text("utf-8")) if self._file.is_file() else {}

    def steps(self, share: float) -> int:
        """The number of steps in a share of all steps."""
        return round(share * self.model["max_steps"])

    def losses(self, model: Any) -> dict[str, float]:
        """Held-out loss, over all tokens and by band."""
        losses, targets, _ = document_losses(model, self.batches)
        bands = frequency_bands(targets, self.data.token_counts)
        by_band = {band: float(losses[bands == i].double().mean()) for i, band in enumerate(BANDS)}
        return {"mean": float(losses.double().mean()), **by_band}

    def finish(self, share: float, *callbacks: pl.Callback) -> Any:
        """Takes the last share of the steps with some callbacks; returns the trained model."""
        pl.seed_everything(self.seed, verbose=False)
        module = module_of(self.study, self.name, self.seed, self.root)
        trainer = trainer_of(self.study, self.name, self.folder / "last", callbacks)
        trainer.fit(module, datamodule=self.data, ckpt_path=str(checkpoint_at(self.folder, self.starts[share])))
        return module.model

    def finished(self, share: float) -> dict[str, float]:
        """Losses of the float model after its last share."""
        return self.losses(self.finish(share, self.monitor()))

    def once(self, key: str, losses_of: Callable[[], dict[str, Any]]) -> None:
        """Measures and keeps a result, unless it is there."""
        if key not in self.results:
            self.results[key] = losses_of()
            with replaced_when_done(self._file) as temporary:
                temporary.write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def annealed(self, share: float, callback: type[PrecisionAnneal] = PrecisionAnneal, **settings: Any) -> Any:
        """Losses of a run whose last share is annealed, or finished with another callback."""
        settings = {"bits": self.settings["bits"], "group_size": self.model["group_size"], **settings}
        anneal = callback(start=self.starts[share], **settings)
        model = self.finish(share, self.monitor(), anneal)
        assert anneal.plan is not None
        return self.losses(model) | {"stored_bits": anneal.plan.stored_bits}

    def monitor(self) -> RouterNormMonitor:
        """The callback that records router norms, with its history in the checkpoints."""
        return monitor_of(self.study, self.name)

    def run(self) -> None:
        """Runs everything."""
        self.afterwards()
        for key, losses_of in self.jobs():
            self.once(key, losses_of)

    def jobs(self) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
        """All runs but the float control of the longest share, by name."""
        budgets, longest = self.settings["budgets"], max(self.starts)
        for share in self.starts:
            if share != longest:
                yield f"float {share}", partial(self.finished, share)
            for budget in budgets:
                yield f"annealed {share} {budget}", partial(self.annealed, share, average_bits=budget, **BEST)
        for budget in budgets:
            yield f"routers {budget}", partial(self.annealed, longest, RoutersOnly, average_bits=budget, **BEST)
        if self.name not in self.settings["detailed"]:
            return
        for budget in self.settings["plan_budgets"]:
            for method in PLANS:
                yield f"plan {method} {budget}", partial(self.with_plan, longest, method, budget)
        for budget in self.settings["scale_budgets"]:
            yield f"refitted {budget}", partial(self.annealed, longest, RefittedScales, average_bits=budget, **BEST)
            yield f"learned {budget}", partial(self.annealed, longest, LearnedScales, average_bits=budget, **BEST)
        recover = self.settings["recover"]
        for steps in (0, *recover["steps"]):
            yield f"recover float {steps}", partial(self.recovered, steps)
        for budget in recover["budgets"]:
            yield f"recover quantized {budget}", partial(self.recovered, 0, budget)
            for steps in recover["steps"]:
                yield f"recover annealed {steps} {budget}", partial(self.recovered, steps, budget)
            steps = max(recover["steps"])
            yield f"recover routers {steps} {budget}", partial(self.recovered, steps, budget, RoutersOnly)
            yield f"recover float {steps} quantized {budget}", partial(self.recovered, steps, budget, None)

    def with_plan(self, share: float, method: str, budget: float) -> Any:
        """An annealed run with an allocator's plan from the levels that all of them can use."""
        if method == "random":  # another draw for each seed
            return self.annealed(share, plan=self.random_plan(budget))
        return self.annealed(
            share, method=method, average_bits=budget, bits=self.settings["plan_bits"], granularity="expert"
        )

    def random_plan(self, budget: float) -> PrecisionPlan:
        """A random plan of this seed."""
        return allocate(
            str(self.folder / "checkpoint"),
            method="random",
            average_bits=budget,
            bits=self.settings["plan_bits"],
            group_size=self.model["group_size"],
            seed=self.seed,
        )

    def recovered(
        self, steps: int, budget: float | None = None, callback: type[PrecisionAnneal] | None = PrecisionAnneal
    ) -> dict[str, float]:
        """Losses after more steps from the finished model, as in recipes/recover.yaml.

        Args:
            steps: How many; 0 for none.
            budget: Average bits of the plan, made from the finished model; None stays in float.
            callback: How the steps are taken; None takes float steps and quantizes afterwards.
        """
        checkpoint, run = self.folder / "checkpoint", PlanFiles.of(self.folder / "precision_plan.json")
        recovery = PlanFiles.of(self.folder / "recover.json")
        if budget is not None:
            shutil.copy(run.curvature, recovery.curvature)
            allocate(
                checkpoint,
                run.history,
                average_bits=budget,
                bits=self.settings["bits"],
                group_size=self.model["group_size"],
                curvature=run.curvature,
                **BEST,
            ).save(recovery.plan)
        pl.seed_everything(self.seed, verbose=False)
        recover = self.settings["recover"]
        module = getattr(recipes, self.model["module"])(
            checkpoint=str(checkpoint), learning_rate=recover["learning_rate"], warmup_steps=recover["warmup_steps"]
        )
        anneals = budget is not None and steps > 0 and callback is not None
        callbacks = [callback(start=0, plan=recovery.plan)] if anneals else []  # type: ignore[misc]
        trainer = trainer_of(self.study, self.name, self.folder / "last", callbacks, max_steps=steps)
        if steps > 0:
            trainer.fit(module, datamodule=self.data)
            model = module.model
        else:
            model = load_model(checkpoint, dtype=torch.float32)
        if budget is not None and not anneals:
            plan = PrecisionPlan.load(recovery.plan)  # of the weights before these steps
            model = quantize_model(
                model, plan.widths_only() if steps else plan, curvature=None if steps else recovery.curvature
            )
        return self.losses(model)

    def afterwards(self) -> None:
        """The float control of the longest share, and what quantizing it afterwards does."""
        control = f"float {max(self.starts)}"
        if control in self.results:
            return
        monitor = self.monitor()
        model = self.finish(max(self.starts), monitor)
        settings, group_size, curvature = self.settings, self.model["group_size"], monitor.curvature
        wanted: dict[str, Setting] = {
            f"afterwards {budget}": {"average_bits": budget, "bits": settings["bits"], **BEST}
            for budget in settings["budgets"]
        }
        for budget in settings["plan_budgets"] if self.name in settings["detailed"] else ():
            for method in PLANS:
                how = {"average_bits": budget, "bits": settings["plan_bits"], "method": method, "seed": self.seed}
                wanted[f"afterwards {method} {budget}"] = how
        found = {}
        with SimulatedExperts(find_moe_layers(model), settings["bits"], group_size, curvature) as simulated:
            for key, how in wanted.items():
                simulated.restore()
                plan = allocate(model, monitor.history, group_size=group_size, curvature=curvature, **how)
                simulated.apply({layer: of.projection_bits for layer, of in plan.layers.items()})
                found[key] = self.losses(model) | {"stored_bits": plan.stored_bits}
        for key, losses in found.items():
            self.once(key, partial(dict, losses))
        self.once(control, partial(self.losses, model))  # the last one: with it, all are there


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed; return what was done."""
    AnnealStudy(study, name, seed, root).run()
    return f"{name} {seed}: done"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    from benchmarks.studies.anneal_report import report

    run(arguments, __doc__, "runs/anneal", lambda study: study["annealing"]["models"], measure, report)


if __name__ == "__main__":
    main()
