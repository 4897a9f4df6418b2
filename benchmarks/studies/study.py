"""The study behind docs/evidence.md: four small models, several seeds, every allocator, two quantizers, one command.

Long because everything that is measured on one trained model is one class.

    python -m benchmarks.studies.study --output runs/study --workers 2
    python -m benchmarks.studies.study --output runs/study --report

The first trains and compares what study.yaml lists, which takes hours on CPU cores; every model and result is a
file, so an interrupted study resumes where it stopped. The second prints the tables of the results that exist.
"""

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.studies.quantizers import quantizers, rtn
from benchmarks.studies.study_models import Batch, Setting, folder_of, merged, rows_of, run, train
from moe_precision.allocation.costs import Costs
from moe_precision.allocation.knapsack import choose
from moe_precision.allocation.orders import bits_from_order, rank_experts
from moe_precision.allocation.planning import plan_from_signals
from moe_precision.allocation.snapshot import Snapshot
from moe_precision.allocation.weights import LiveWeights
from moe_precision.checkpoints.checkpoint import load_model
from moe_precision.files import replaced_when_done
from moe_precision.judging.evaluation import BANDS, document_losses, frequency_bands, token_losses
from moe_precision.judging.judge import Judge
from moe_precision.judging.simulation import Bits, Matrix, SimulatedExperts
from moe_precision.judging.statistics import rank_correlation
from moe_precision.layers.moe_layers import MoELayer, find_moe_layers
from moe_precision.plans.beside import PlanFiles
from moe_precision.plans.methods import COST_METHODS, METHODS, ORDER_METHODS
from moe_precision.plans.settings import PlanSettings
from moe_precision.plans.widths import GRANULARITIES, stored_bits_per_weight
from moe_precision.quantize.codec.fitting import quantize_matrix
from moe_precision.recording.curvature import Curvature
from moe_precision.recording.gradients import curvature_of_losses
from moe_precision.recording.history import RouterNormHistory

ORDERS = tuple(method for method in ORDER_METHODS if method not in ("random", "uniform"))
ZETAS = (1.5, 2.0, 5.0)  # in addition to the paper's 3, which is `router_norm`, and `norm_only`
MAIN = [2, 3]


class Study:
    """One trained model and everything that is measured on it.

    Args:
        study: The settings.
        name: The model's key in them.
        seed: Its seed.
        root: Folder of the study.
    """

    def __init__(self, study: Setting, name: str, seed: int, root: Path) -> None:
        self.study, self.group_size = study, study["models"][name]["group_size"]
        data, folder = train(study, name, seed, root), folder_of(name, seed, root)
        self.model: PreTrainedModel = load_model(folder / "checkpoint", dtype=torch.float32).eval()
        self.layers: list[MoELayer] = find_moe_layers(self.model)
        files = PlanFiles.of(folder / "precision_plan.json")
        self.history, self.curvature = RouterNormHistory.load(files.history), Curvature.load(files.curvature)
        self.baseline = Snapshot.first_of(self.history)
        self.final = LiveWeights(self.model, self.history.patterns).snapshot(variance=True)
        self.token_counts: Tensor = data.token_counts
        self.judge = Judge(self.model, merged(data.val_dataloader()), self.token_counts)
        training = list(islice(data.train_dataloader(), study["gradient_rows"] // data.hparams["batch_size"] + 1))
        self.gradient_batches = training
        self.calibration = merged(rows_of(training, study["calibration_rows"], data.hparams["batch_size"]))
        self._seen: dict[tuple, dict[str, float]] = {}
        self.results: list[Setting] = []

    def score(self, simulated: SimulatedExperts, bits: Bits, quantizer: str) -> dict[str, float]:
        """Increase of the held-out loss with some widths, overall and by band; equal widths are measured only once."""
        key = (quantizer, *(width for layer in bits.values() for widths in layer.values() for width in widths))
        if key not in self._seen:
            simulated.apply(bits)
            sums, divergence = self.judge.measure()
            self._seen[key] = {"mean": self.judge.mean(sums).value, "worst": self.judge.worst_decile(sums)}
            self._seen[key] |= {"kl": divergence.kl, "kl_99": divergence.kl_99, "top1": divergence.top1}
            self._seen[key] |= {band: self.judge.mean(sums, band).value for band in BANDS}
        return self._seen[key]

    def add(self, simulated: SimulatedExperts, plan: Any, method: str, quantizer: str, levels: list[int]) -> None:
        """Score a plan and keep the result."""
        bits = {layer: of.projection_bits for layer, of in plan.layers.items()}
        self.results.append(
            {
                "method": method,
                "granularity": plan.settings.granularity,
                "quantizer": quantizer,
                "levels": levels,
                "budget": plan.settings.average_bits,
                "seed": plan.settings.seed if plan.method == "random" else None,
                "stored_bits": plan.stored_bits,
            }
            | self.score(simulated, bits, quantizer)
        )

    def sensitivity(self, simulated: SimulatedExperts, levels: Sequence[int]) -> tuple[Costs, dict[str, Costs]]:
        """Measured at all levels below 8, over all calibration tokens and by band; 8 bits are taken to cost nothing."""
        measured = [level for level in levels if level < 8]
        _, targets, _ = document_losses(self.model, self.calibration)
        bands = frequency_bands(targets, self.token_counts)
        seen: list[list[float]] = []

        def loss() -> float:
            losses = document_losses(self.model, self.calibration)[0].double()
            seen.append([float(losses.mean()), *(float(losses[bands == i].mean()) for i in range(len(BANDS)))])
            return seen[-1][0]

        costs = simulated.sensitivity(measured, loss)
        table = torch.tensor(seen[1:], dtype=torch.float64) - torch.tensor(seen[0], dtype=torch.float64)
        by_band: dict[str, Costs] = {band: {} for band in BANDS}
        start = 0
        for layer in self.layers:
            for projection in layer.banks:
                end = start + layer.num_experts * len(measured)
                for i, band in enumerate(BANDS):
                    of_layer = by_band[band].setdefault(layer.name, {})
                    of_layer[projection] = table[start:end, i + 1].view(layer.num_experts, -1)
                start = end
        free = torch.zeros(1, dtype=torch.float64)
        return {
            name: {
                p: torch.cat([of, free.expand(len(of), len(levels) - len(measured))], dim=1) for p, of in layer.items()
            }
            for name, layer in costs.items()
        }, by_band

    def gradient_costs(self, simulated: SimulatedExperts, levels: Sequence[int]) -> dict[str, Costs]:
        """Costs by gradients of training batches at the final weights, which an optimizer does not keep.

        ``squared_gradients`` is curvature from batches as large as training's, ``tail`` is curvature of the loss on the
        rarest tenth of targets only, and ``fisher`` is ``1/2 E (g . error)**2`` with the gradient ``g`` of a row: the
        whole empirical Fisher matrix of each expert matrix and not just its diagonal.
        """
        with torch.no_grad():
            targets = [token_losses(self.model, batch)[1] for batch in self.gradient_batches]
        bands = frequency_bands(torch.cat(targets), self.token_counts).split([len(one) for one in targets])

        def losses_of(batch: Batch) -> Tensor:
            return token_losses(self.model, batch)[0]

        def squared(index: int, tail: bool) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                losses = losses_of(self.gradient_batches[index])
                return (losses * (bands[index] == 2)).mean() if tail else losses.mean()

            return loss

        count = range(len(self.gradient_batches))
        costs = {}
        for name, tail in (("squared_gradients", False), ("tail", True)):
            curvature = curvature_of_losses(self.layers, [squared(i, tail) for i in count])
            costs[name] = simulated.costs(levels, curvature)
        costs["fisher"] = self._fisher(simulated, levels, losses_of)
        self.model.zero_grad(set_to_none=True)
        return costs

    def _fisher(
        self, simulated: SimulatedExperts, levels: Sequence[int], losses_of: Callable[[Batch], Tensor]
    ) -> Costs:
        places = {layer.name: layer for layer in self.layers}
        errors: dict[Matrix, Tensor] = {}
        for layer in self.layers:
            for name in layer.banks:
                for expert in range(layer.num_experts):
                    matrix = (layer.name, name, expert)
                    exact = simulated.values(matrix, 16)
                    errors[matrix] = torch.stack([simulated.values(matrix, b) - exact for b in levels]).flatten(1)
        sums = {matrix: torch.zeros(len(levels), dtype=torch.float64) for matrix in errors}
        rows = 0
        for row in rows_of(self.gradient_batches, self.study["gradient_rows"]):
            self.model.zero_grad(set_to_none=True)
            losses_of(row).mean().backward()
            rows += 1
            for (name, projection, expert), error in errors.items():
                bank = places[name].banks[projection]
                one = len(bank.weights) == 1
                grad = bank.weights[0 if one else expert].parameter().grad
                if grad is not None:
                    grad = grad[expert] if one else grad
                    grad = grad.T if bank.transposed else grad
                    sums[name, projection, expert] += (error @ grad.reshape(-1)).double().square()
        return {
            layer.name: {
                name: torch.stack([sums[layer.name, name, e] for e in range(layer.num_experts)]) / (2 * rows)
                for name in layer.banks
            }
            for layer in self.layers
        }

    def mixtures(self, costs: dict[str, Costs]) -> dict[str, Costs]:
        """Products and sums of costs with other signals, to see whether any is better than curvature alone."""
        load = self.baseline.loads
        share = {name: (of[0] / of[0].mean()).sqrt()[:, None] for name, of in load.items()}
        total = {name: sum(float(p[:, 0].sum()) for of in costs[name].values() for p in of.values()) for name in costs}

        def each(of: Callable[[str, str], Tensor]) -> Costs:
            return {name: {p: of(name, p) for p in layer} for name, layer in costs["curvature"].items()}

        return {
            "curvature x sqrt(load)": each(lambda n, p: costs["curvature"][n][p] * share[n]),
            "curvature + tail": each(
                lambda n, p: costs["curvature"][n][p] / total["curvature"] + costs["tail"][n][p] / total["tail"]
            ),
        }

    def allocators(self) -> None:
        """Scores every allocator at every combination with our quantizer, the main ones with round to nearest too."""
        every = sorted({level for combination in self.study["combinations"] for level in combination["bits"]})
        name = "unbiased gain, curvature"
        with SimulatedExperts(self.layers, every, self.group_size, self.curvature) as simulated:
            costs = {
                "weight_error": simulated.costs(every, None),
                "curvature": simulated.costs(every, self.curvature),
            }
            costs["sensitivity"], by_band = self.sensitivity(simulated, every)
            self.correlations = self._correlations(costs, by_band, every)
            simulated.restore()
            costs |= self.gradient_costs(simulated, every)
            costs |= self.mixtures(costs)
            for combination in self.study["combinations"]:
                self._combination(simulated, costs, every, name, combination["bits"], combination["budgets"])
            for level in (1, 2, 3, 4):
                plan = self._plan("uniform", level, [level])
                self.add(simulated, plan, f"uniform {level}", name, [level])
            for zeta in ZETAS:
                for budget in (2.25, 2.5):
                    plan = self._plan("router_norm", budget, MAIN, zeta=zeta)
                    self.add(simulated, plan, f"router_norm, zeta {zeta:g}", name, MAIN)
        with SimulatedExperts(self.layers, MAIN, self.group_size, None, rtn) as simulated:
            costs = {"weight_error": simulated.costs(MAIN, None), "curvature": simulated.costs(MAIN, self.curvature)}
            costs["sensitivity"], _ = self.sensitivity(simulated, MAIN)
            self._combination(simulated, costs, MAIN, "round to nearest", MAIN, [2.25, 2.5])

    def _plan(self, method: str, budget: float, levels: list[int], costs: Costs | None = None, **more: Any) -> Any:
        known = method if method in METHODS else "sensitivity"  # a variant: another method's choice with other costs
        settings = PlanSettings(method=known, average_bits=budget, bits=levels, group_size=self.group_size, **more)
        return plan_from_signals(settings, self.final, self.baseline, costs)

    def _combination(
        self,
        simulated: SimulatedExperts,
        costs: dict[str, Costs],
        measured: Sequence[int],
        quantizer: str,
        levels: list[int],
        budgets: Sequence[float],
    ) -> None:
        columns = [list(measured).index(level) for level in levels]
        chosen = {
            method: {name: {p: of[:, columns] for p, of in layer.items()} for name, layer in found.items()}
            for method, found in costs.items()
        }
        equally_spaced = len(levels) < 4
        for budget in budgets:
            for method in ORDERS if equally_spaced else ():
                assert method in METHODS
                self.add(simulated, self._plan(method, budget, levels), method, quantizer, levels)
            for seed in range(self.study["random_draws"] if equally_spaced else 0):
                self.add(simulated, self._plan("random", budget, levels, seed=seed), "random", quantizer, levels)
            for method, found in chosen.items():
                judged = method in COST_METHODS
                if not judged and equally_spaced and levels != MAIN:
                    continue
                for granularity in GRANULARITIES if judged else GRANULARITIES[:2]:
                    plan = self._plan("curvature", budget, levels, granularity=granularity, costs=found)
                    self.add(simulated, plan, method, quantizer, levels)

    def _correlations(
        self, costs: dict[str, Costs], by_band: dict[str, Costs], levels: Sequence[int]
    ) -> dict[str, dict[str, float]]:
        """Spearman's correlation of every signal with the sensitivity of experts at 2 bits, overall and by band."""
        column = list(levels).index(2)

        def of_experts(found: Costs, at: int) -> dict[str, Tensor]:
            return {name: torch.stack([of[:, at] for of in layer.values()]).sum(0) for name, layer in found.items()}

        references = {"all": of_experts(costs["sensitivity"], column)}
        references |= {band: of_experts(found, column) for band, found in by_band.items()}
        loads, last = self.baseline.loads, self.final.router_norms
        signals = {
            "router_norm_change": {n: self.baseline.router_norms[n] - norm for n, norm in last.items()},
            "final_router_norm": {name: -norm for name, norm in last.items()},
            "max_variance": dict(self.final.max_variance),
            "expert_load": {name: of[0] for name, of in loads.items()},
            "routing_weight": {name: of[1] for name, of in loads.items()},
            "weight_error": of_experts(costs["weight_error"], column),
            "curvature": of_experts(costs["curvature"], column),
        }
        found: dict[str, dict[str, float]] = {}
        for signal, values in signals.items():
            found[signal] = {}
            for band, reference in references.items():
                pairs = [(values[name].double(), reference[name]) for name in reference]
                together = [torch.cat(column) for column in zip(*pairs, strict=True)]
                found[signal][band] = rank_correlation(*together)
                within = [rank_correlation(*pair) for pair in pairs]
                found[signal][f"{band}, within layers"] = float(np.nanmean(within))
        return found

    def fits(self) -> dict[str, dict[int, float]]:
        """Increase of the loss with all experts at one width, by quantizer."""
        found: dict[str, dict[int, float]] = {}
        for name, quantizer in quantizers().items():
            weights = self.curvature if name.endswith("curvature") else None
            with SimulatedExperts(self.layers, (1, 2, 3, 4), self.group_size, weights, quantizer) as simulated:
                for bits in (1, 2, 3, 4):
                    plan = self._plan("uniform", bits, [bits])
                    widths = {layer: of.projection_bits for layer, of in plan.layers.items()}
                    found.setdefault(name, {})[bits] = self.score(simulated, widths, name)["mean"]
        return found

    def group_sizes(self) -> list[Setting]:
        """Curvature with the group size as a choice too, at equal stored bits."""
        small = self.group_size // 2
        choices = {bits: (bits, self.group_size) for bits in (1, 2, 3, 4)}
        choices |= {10 + bits: (bits, small) for bits in (1, 2, 3, 4)}

        def quantizer(weight: Tensor, choice: int, _: int, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return quantize_matrix(weight, *choices[choice], weights)

        found = []
        with SimulatedExperts(self.layers, list(choices), self.group_size, self.curvature, quantizer) as simulated:
            costs = simulated.costs(list(choices), self.curvature)
            sets = {"2, 3": [2, 3], "1 to 4": [1, 2, 3, 4]}
            for title, widths in sets.items():
                for both in (False, True):
                    allowed = widths + [10 + bits for bits in widths] * both
                    for stored in (2.75, 3.0):
                        low = min(stored_bits_per_weight(*choices[choice]) for choice in allowed)
                        bits = self._choose(costs, list(choices), allowed, choices, max(stored, low))
                        score = self.score(simulated, bits, "group sizes")
                        sizes = f"{small} and {self.group_size}" if both else f"{self.group_size}"
                        found.append({"widths": title, "group sizes": sizes, "stored_bits": stored} | score)
        return found

    def _choose(
        self, costs: Costs, measured: list[int], allowed: list[int], choices: dict[int, tuple[int, int]], stored: float
    ) -> dict[str, dict[str, list[int]]]:
        columns = [measured.index(choice) for choice in allowed]
        table, sizes, units = [], [], []
        for layer in self.layers:
            for projection, (out, inp) in layer.projections.items():
                for expert in range(layer.num_experts):
                    table.append(costs[layer.name][projection][expert, columns].numpy())
                    sizes.append([round(stored_bits_per_weight(*choices[c]) * out * inp) for c in allowed])
                    units.append((layer.name, projection))
        weights = sum(layer.shape.expert_size * layer.num_experts for layer in self.layers)
        index = choose(np.stack(table), np.array(sizes, dtype=np.int64), int(stored * weights)).index
        bits: dict[str, dict[str, list[int]]] = {}
        for choice, (name, projection) in zip(index, units, strict=True):
            bits.setdefault(name, {}).setdefault(projection, []).append(allowed[choice])
        return bits

    def settling(self) -> list[Setting]:
        """At every record: Kendall's tau of the changes with the last ones, and the share of differing bits at 2.5."""
        last = self.history.changes()

        def bits_at(record: int) -> dict[str, list[int]]:
            return {n: bits_from_order(rank_experts(c), 2.5, MAIN) for n, c in self.history.changes(record).items()}

        final, found = bits_at(-1), []
        for record in range(1, len(self.history.steps)):
            changes, bits = self.history.changes(record), bits_at(record)
            taus = [float(kendalltau(changes[name], last[name]).statistic) for name in last]
            pairs = [(a, b) for name in final for a, b in zip(bits[name], final[name], strict=True)]
            found.append(
                {
                    "share_of_training": self.history.steps[record] / self.history.steps[-1],
                    "tau": float(np.mean(taus)),
                    "other_bits": sum(a != b for a, b in pairs) / len(pairs),
                }
            )
        return found


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    result = folder_of(name, seed, root) / "result.json"
    if result.is_file():
        return f"{name} {seed}: found"
    one = Study(study, name, seed, root)
    one.allocators()
    found = {
        "model": name,
        "seed": seed,
        "tokens": int(one.judge.counts.sum()),
        "loss": one.judge.loss,
        "results": one.results,
        "correlations": one.correlations,
        "quantizers": one.fits(),
        "group_sizes": one.group_sizes(),
        "settling": one.settling(),
    }
    with replaced_when_done(result) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return f"{name} {seed}: done"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print its tables."""
    from benchmarks.studies.study_report import report

    run(arguments, __doc__, "runs/study", lambda study: study["compared"], measure, report)


if __name__ == "__main__":
    main()
