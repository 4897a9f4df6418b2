"""Dropping experts as one more width, against expert pruning as published followed by the same quantizer.

    python -m benchmarks.studies.dropping_study --output runs/study --workers 2
    python -m benchmarks.studies.dropping_study --output runs/study --report

The models of `study`, trained here if they are not there yet. Pruning drops the same number of experts of every
layer, those with the least of a criterion, their tokens go to the next best experts, and all others get one width; of
1, 2 and 3 bits the best one at these stored bits is reported.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.experts_seen import CRITERIA, PLACES, Dropped, in_place_of, seen_experts
from benchmarks.studies.rounding_study import RoundingStudy
from benchmarks.studies.study_models import Setting, folder_of, run
from moe_precision import PrecisionPlan, RouterNormHistory, allocate, distill_scales, quantize_model, replan
from moe_precision.allocation.snapshot import Snapshot
from moe_precision.files import replaced_when_done
from moe_precision.judging.simulation import SimulatedExperts
from moe_precision.judging.statistics import rank_correlation
from moe_precision.layers.moe_layers import find_moe_layers
from moe_precision.plans.beside import PlanFiles
from moe_precision.recording.router_norms import max_variances

LEVELS = (0, 1, 2, 3, 4)
BUDGETS = (0.5, 0.75, 1.0, 1.25, 1.5)  # nominal bits
COMPARED = (0.75, 1.0, 1.25)  # at which pruning is tried
STEPS = 100


class DroppingStudy(RoundingStudy):
    """One trained model, plans with and without 0 bits, and pruning; arguments as of `RoundingStudy`."""

    def __init__(self, study: Setting, name: str, seed: int, root: Path) -> None:
        super().__init__(study, name, seed, root)
        self.layers = find_moe_layers(self.model)
        self.seen = seen_experts(self.model, self.layers, self.training[:32])
        history = RouterNormHistory.load(PlanFiles.of(folder_of(name, seed, root) / "precision_plan.json").history)
        first, last = Snapshot.first_of(history).router_norms, Snapshot.last_of(history).router_norms
        self.change = {layer: last[layer] - first[layer] for layer in last}

    def measure(self) -> list[dict[str, Any]]:
        """All plans, all criteria, all that may stand in a dropped expert's place."""
        known = {"curvature": self.curvature, "statistics": self.statistics, "group_size": self.group_size}
        asked = {"method": "statistics", "average_bits": 1.5, **known}
        with_zero = allocate(self.model, bits=LEVELS, **asked)
        calibrated = allocate(self.model, bits=LEVELS, calibration=self.training, **asked)
        without = allocate(self.model, bits=LEVELS[1:], calibration=self.training, **asked)
        with SimulatedExperts(self.layers, LEVELS[1:], self.group_size, self.curvature, None, self.statistics) as now:
            self.now = now
            for bits in (1, 2):
                self._judge(f"uniform {bits}", self._uniform(bits), bits + 18 / self.group_size)
            for budget in BUDGETS:
                for name, plan in (("0 to 4", calibrated), ("0 to 4, not calibrated", with_zero), ("1 to 4", without)):
                    if budget > 1 or name != "1 to 4":
                        self._plan(f"{name} at {budget:g}", replan(plan, average_bits=budget))
            for budget in COMPARED:
                self._prune(budget, replan(calibrated, average_bits=budget).stored_bits)
            chosen = replan(calibrated, average_bits=1.0)
            for place in PLACES:
                self._plan(f"{place} at 1", chosen, place)
        packed = quantize_model(copy.deepcopy(self.model), chosen, **{k: known[k] for k in ("curvature", "statistics")})
        distill_scales(packed, self.model, self.training, steps=STEPS)
        self._add("0 to 4 at 1", "distilled", chosen, packed)
        self.correlations = self._correlations(calibrated)
        return self.results

    def _uniform(self, bits: int) -> dict[str, dict[str, list[int]]]:
        return {one.name: {p: [bits] * one.num_experts for p in one.projections} for one in self.layers}

    def _plan(self, name: str, plan: PrecisionPlan, place: str = PLACES[0]) -> None:
        dropped = {layer: of.dropped for layer, of in plan.layers.items()}
        self._judge(
            name, {layer: of.projection_bits for layer, of in plan.layers.items()}, plan.stored_bits, place, dropped
        )

    def _judge(
        self, name: str, bits: Any, stored: float, place: str = PLACES[0], dropped: Dropped | None = None
    ) -> dict[str, Any]:
        self.now.apply(bits)
        gone = dropped or {layer.name: [] for layer in self.layers}
        with in_place_of(place, self.layers, gone, self.seen, self.model):
            found = {"plan": name, "stored_bits": stored, "dropped": sum(map(len, gone.values()))} | self.as_it_is()
        self.results.append(found)
        return found

    def _prune(self, budget: float, stored: float) -> None:
        """Pruning as published, at no fewer stored bits than a plan takes."""
        for criterion, of in CRITERIA.items():
            tried = []
            for bits, gone in self._pruned(stored):
                dropped, widths = {}, self._uniform(bits)
                for layer in self.layers:
                    count = round(gone * layer.num_experts)
                    signal = of(self.seen[layer.name], self.change[layer.name])
                    dropped[layer.name] = signal.argsort()[:count].tolist()
                    for bank in widths[layer.name].values():
                        for expert in dropped[layer.name]:
                            bank[expert] = 0
                left = 1 - sum(map(len, dropped.values())) / sum(layer.num_experts for layer in self.layers)
                size = left * (bits + 18 / self.group_size)
                tried.append(self._judge(f"{criterion} at {budget:g}", widths, size, PLACES[3], dropped))
                self.results.pop()
            if tried:
                self.results.append(min(tried, key=lambda one: one["own"]["kl"]))

    def _pruned(self, stored: float) -> Iterator[tuple[int, float]]:
        """Widths, and the share of a layer's experts that must go at each for these stored bits, rounded down."""
        experts, needed = self.layers[0].num_experts, self.layers[0].shape.top_k or 1  # as in all layers
        for bits in (1, 2, 3):
            whole = bits + 18 / self.group_size
            count = int((1 - stored / whole) * experts) if whole > stored else 0
            if 0 < count <= experts - needed:
                yield bits, count / experts

    def _correlations(self, plan: PrecisionPlan) -> dict[str, float]:
        """Spearman's correlation of what an expert's absence costs with other signals, over the experts of a layer."""
        signals = {
            "norm change": self.change,
            "MaxVar": {layer.name: max_variances(layer) for layer in self.layers},
            "load": {name: seen.tokens for name, seen in self.seen.items()},
            "REAP": {name: seen.reap for name, seen in self.seen.items()},
        }
        costs = {name: torch.tensor([by[0] for by in of.costs.values()]).sum(0) for name, of in plan.layers.items()}
        return {
            key: sum(rank_correlation(of[name], costs[name]) for name in costs) / len(costs)
            for key, of in signals.items()
        }


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    result = folder_of(name, seed, root) / "dropping.json"
    if result.is_file():
        return f"{name} {seed}: found"
    one = DroppingStudy(study, name, seed, root)
    found = {"tokens": one.statistics.described(), "results": one.measure(), "correlations": one.correlations}
    with replaced_when_done(result) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return f"{name} {seed}: done"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    from benchmarks.studies.dropping_report import report

    run(arguments, __doc__, "runs/study", lambda study: study["models"], measure, report)


if __name__ == "__main__":
    main()
