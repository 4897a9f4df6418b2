"""Pruning of experts' channels at the stored bits of the plans of `dropping_study`, whose results it needs.

    python -m benchmarks.studies.channel_study --output runs/study --workers 2

A channel is a row of gate and up, and its column of down. Those of the least attribution in a layer go, and what is
left gets one width. Attribution as in MoE-Slimming (arXiv 2606.18304) is activation times gradient, here summed over
the tokens of a sequence; that paper's weights per expert, by the loss without it, are left out.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.dropping_study import COMPARED
from benchmarks.studies.rounding_study import RoundingStudy
from benchmarks.studies.study_models import Batch, Setting, folder_of, rows_of, run
from moe_precision.files import replaced_when_done
from moe_precision.judging.simulation import SimulatedExperts
from moe_precision.layers.moe_layers import MoELayer, find_moe_layers

ROWS = 128  # sequences that channels are judged on
WIDTHS = (1, 2, 3, 4)


def channel_scores(model: Any, layers: Sequence[MoELayer], rows: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over sequences of ``|sum over tokens of activation times gradient|`` of every channel.

    That sum is what the matrix behind the channels, down, and its gradient give: ``sum_o W[o, c] G[o, c]``.

    Returns:
        Layer name -> ``(E, F)``.
    """
    last = {layer.name: list(layer.banks.values())[-1] for layer in layers}
    scores = {layer.name: torch.zeros(layer.num_experts, last[layer.name].shape[1]) for layer in layers}
    count = 0
    for row in rows:
        model.zero_grad()
        model(**row).loss.backward()
        count += 1
        for name, bank in last.items():
            for expert in range(len(scores[name])):
                parameter = bank.weights[expert if len(bank.weights) > 1 else 0].parameter()
                if parameter.grad is not None:
                    gradient = parameter.grad if parameter.ndim == 2 else parameter.grad[expert]  # (out, F)
                    scores[name][expert] += (bank.read(expert).detach() * gradient).sum(0).abs()
    model.zero_grad()
    return {name: score / max(count, 1) for name, score in scores.items()}


class ChannelStudy(RoundingStudy):
    """One trained model, its channels pruned; arguments as of `RoundingStudy`.

    Attributes:
        stored: Budget of a plan -> its stored bits.
    """

    stored: dict[float, float]

    def measure(self) -> list[dict[str, Any]]:
        """At the stored bits of each plan that pruning of experts is compared with."""
        layers = find_moe_layers(self.model)
        scores = channel_scores(self.model, layers, rows_of(self.training, ROWS))
        with SimulatedExperts(layers, WIDTHS, self.group_size, self.curvature, None, self.statistics) as now:
            for budget, stored in self.stored.items():
                tried = []
                for bits, share in self._shares(stored):
                    now.restore()
                    now.apply({one.name: {name: [bits] * one.num_experts for name in one.banks} for one in layers})
                    for layer in layers:
                        _cut(layer, scores[layer.name], share)
                    size = share * (bits + 18 / self.group_size)
                    plan = {"plan": f"channels at {budget:g}", "bits": bits, "stored_bits": size}
                    tried.append(plan | self.as_it_is())
                self.results.append(min(tried, key=lambda one: one["own"]["kl"]))
        return self.results

    def _shares(self, stored: float) -> Iterator[tuple[int, float]]:
        """Widths, and the share of the channels that is kept at each for these stored bits."""
        for bits in WIDTHS:
            whole = bits + 18 / self.group_size
            if whole > stored:
                yield bits, stored / whole


@torch.no_grad()
def _cut(layer: MoELayer, scores: Tensor, share: float) -> None:
    """Takes the channels with the least scores of a layer away, as the columns of its last matrices."""
    bank = list(layer.banks.values())[-1]
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().topk(math.ceil(share * scores.numel())).indices] = True
    for expert, columns in enumerate(kept.view_as(scores)):
        bank.read(expert)[:, ~columns] = 0


def measure(study: Setting, name: str, seed: int, root: Path) -> str:
    """Do everything for one model and seed, unless its result exists; return what was done."""
    folder = folder_of(name, seed, root)
    result = folder / "channels.json"
    if result.is_file():
        return f"{name} {seed}: found"
    plans = json.loads((folder / "dropping.json").read_text(encoding="utf-8"))["results"]
    one = ChannelStudy(study, name, seed, root)
    by_name = {plan["plan"]: plan["stored_bits"] for plan in plans if "fit" not in plan}
    one.stored = {budget: by_name[f"0 to 4 at {budget:g}"] for budget in COMPARED}
    with replaced_when_done(result) as temporary:
        temporary.write_text(json.dumps({"results": one.measure()}), encoding="utf-8")
    return f"{name} {seed}: done"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study or print the tables of both."""
    from benchmarks.studies.dropping_report import report

    run(arguments, __doc__, "runs/study", lambda study: study["models"], measure, report)


if __name__ == "__main__":
    main()
