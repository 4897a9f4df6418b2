"""The tables of docs/evidence.md, from the results of study.py: means over seeds, 95 % intervals.

Long because it prints all tables of one page.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.study import MAIN
from moe_precision.judging.evaluation import BANDS
from moe_precision.judging.statistics import Interval, mean_of_runs, ratio_of_runs
from moe_precision.plans.methods import COST_METHODS

OURS = "unbiased gain, curvature"
RTN = "round to nearest"
SHOWN = (
    ("uniform 2", "expert"),
    ("uniform 3", "expert"),
    ("router_norm", "expert"),
    ("norm_only", "expert"),
    ("final_norm", "expert"),
    ("max_variance", "expert"),
    ("reversed", "expert"),
    ("random", "expert"),
    ("load", "expert"),
    ("least_load", "expert"),
    ("weight_error", "expert"),
    ("weight_error", "expert+projection"),
    ("curvature", "expert"),
    ("curvature", "expert+projection"),
    ("curvature", "layer"),
    ("curvature", "layer+projection"),
    ("sensitivity", "expert"),
    ("sensitivity", "expert+projection"),
    ("sensitivity", "layer"),
    ("sensitivity", "layer+projection"),
)
VARIANTS = ("squared_gradients", "fisher", "tail", "curvature + tail", "curvature x sqrt(load)")
BEST = ("curvature", "expert+projection")
HEADER = """# Tables of the study

Printed by `python -m benchmarks.studies.study --report`; [evidence.md](evidence.md) says what they mean. Entries are
means over seeds ± half of the 95 % interval, or ratios with their interval.
"""

Runs = list[dict[str, Any]]  # the results of one model, one per seed


def load(study: dict[str, Any], root: Path) -> dict[str, Runs]:
    """Results by model, as far as they exist."""
    found = {}
    for name in study["models"]:
        paths = sorted((root / name).glob("seed_*/result.json"))
        if paths:
            found[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return found


def values(
    runs: Runs,
    method: str,
    granularity: str = "expert",
    budget: float | None = 2.5,
    levels: Sequence[int] = MAIN,
    quantizer: str = OURS,
    key: str = "mean",
) -> list[float]:
    """For each seed, the increase of the loss; the mean over its draws where there are several."""
    found = []
    for run in runs:
        of_run = [
            one[key]
            for one in run["results"]
            if (one["method"], one["granularity"], one["quantizer"]) == (method, granularity, quantizer)
            and (method.startswith("uniform") or (one["budget"] == budget and one["levels"] == list(levels)))
        ]
        if of_run:
            found.append(float(np.mean(of_run)))
    return found


def plain(interval: Interval, digits: int = 4) -> str:
    """``value ± half width``, where the interval is symmetric."""
    return f"{interval.value:.{digits}f} ± {(interval.high - interval.low) / 2:.{digits}f}"


def between(interval: Interval) -> str:
    """``value [low, high]``."""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def of_runs(numbers: Sequence[float], digits: int = 4) -> str:
    """Mean of one number per seed ± half of its interval; of one or two, the mean alone; a dash where there is none."""
    if len(numbers) < 3:  # an interval of two says nothing
        return f"{sum(numbers) / len(numbers):.{digits}f}" if numbers else "-"
    return plain(mean_of_runs(numbers), digits)


def markdown_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under a heading of the third level."""
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def _label(method: str, granularity: str) -> str:
    several = method in (*COST_METHODS, *VARIANTS)
    return f"{method}, {granularity}" if several else method


def report(study: dict[str, Any], root: Path) -> str:
    """All tables as Markdown."""
    found = load(study, root)
    if not found:
        return f"no result in {root}: run the study first"
    models = list(found)
    parts = [HEADER, _models(study, found)]

    def per_model(title: str, methods: Sequence[tuple[str, str]], **how: Any) -> None:
        rows = []
        for method, granularity in methods:
            cells = [of_runs(values(found[name], method, granularity, **how)) for name in models]
            if any(cell != "-" for cell in cells):
                rows.append([_label(method, granularity), *cells])
        parts.append(markdown_table(title, ["method", *models], rows))

    per_model("Increase of the loss at 2.5 bits from {2, 3}, all tokens", SHOWN)
    per_model("Increase of the loss at 2.5 bits from {2, 3}, rarest tenth of the tokens", SHOWN, key="rare")
    per_model("Increase of the loss at 2.5 bits from {2, 3}, most frequent half of the tokens", SHOWN, key="frequent")
    per_model("Increase of the loss at 2.5 bits from {2, 3}, worst tenth of the documents", SHOWN, key="worst")
    parts.append(_targets(found))
    parts.append(_paper(found))
    for combination in study["combinations"]:
        for budget in combination["budgets"]:
            if combination["bits"] != MAIN or budget != 2.5:
                levels = ", ".join(map(str, combination["bits"]))
                title = f"Increase of the loss at {budget:g} bits from {{{levels}}}"
                short = [one for one in SHOWN if one[0] not in ("uniform 2", "uniform 3", "norm_only", "least_load")]
                short = [one for one in short if "layer" not in one[1] or one[0] == "curvature"]
                per_model(title, short, budget=budget, levels=combination["bits"])
    under = [one for one in SHOWN if not one[0].startswith("uniform")]
    per_model("Round to nearest, 2.5 bits from {2, 3}", under, quantizer=RTN)
    per_model("Round to nearest, 2.25 bits from {2, 3}", under, quantizer=RTN, budget=2.25)
    parts.append(_quantizers(found))
    parts.append(_zetas(found))
    parts.append(_correlations(found))
    parts.append(_settling(found))
    parts.append(_variants(found))
    parts.append(_granularities(found))
    parts.append(_group_sizes(found))
    return "\n".join(parts)


def _models(study: dict[str, Any], found: dict[str, Runs]) -> str:
    rows = []
    for name, runs in found.items():
        uniform = [of_runs(values(runs, f"uniform {bits}")) for bits in (1, 2, 3, 4)]
        loss = of_runs([run["loss"]["all"] for run in runs], 3)
        rows.append([name, study["models"][name]["title"], str(len(runs)), str(runs[0]["tokens"]), loss, *uniform])
    head = (
        "model",
        "what it is",
        "seeds",
        "tokens judged",
        "float loss",
        *(f"all at {b}: increase" for b in range(1, 5)),
    )
    return markdown_table("The models", head, rows)


def _ratio(runs: Runs, over: tuple[str, str], key: str = "mean", **how: Any) -> str:
    top, bottom = values(runs, *BEST, key=key, **how), values(runs, *over, key=key, **how)
    return between(ratio_of_runs(top, bottom)) if top and len(top) == len(bottom) else "-"


def _difference(runs: Runs, one: tuple[str, str], other: tuple[str, str], key: str, **how: Any) -> list[float]:
    first, second = values(runs, *one, key=key, **how), values(runs, *other, key=key, **how)
    return [a - b for a, b in zip(first, second, strict=True)]


def _targets(found: dict[str, Runs]) -> str:
    rows = []
    for name, runs in found.items():
        against = [("router_norm", "expert"), ("load", "expert"), ("random", "expert"), ("sensitivity", BEST[1])]
        rare = of_runs(_difference(runs, BEST, ("router_norm", "expert"), "rare"))
        rows.append([name, *(_ratio(runs, other) for other in against), rare])
    head = (
        "model",
        "to router_norm",
        "to load",
        "to random",
        "to sensitivity, expert+projection",
        "rare, minus router_norm",
    )
    title = "curvature, expert+projection: its increase as a ratio to others' (2.5 bits from {2, 3})"
    return markdown_table(title, head, rows)


def _paper(found: dict[str, Runs]) -> str:
    rows = []
    for name, runs in found.items():
        cells = []
        for other in (("random", "expert"), ("reversed", "expert")):
            for key in ("mean", *BANDS):
                cells.append(of_runs(_difference(runs, ("router_norm", "expert"), other, key)))
        rows.append([name, *cells])
    head = ["model", *(f"{other}, {key}" for other in ("minus random", "minus reversed") for key in ("all", *BANDS))]
    return markdown_table(
        "router_norm: its increase minus that of random and of reversed order (2.5 bits from {2, 3})", head, rows
    )


def _quantizers(found: dict[str, Runs]) -> str:
    names = list(next(iter(found.values()))[0]["quantizers"])
    rows = []
    for name in names:
        for bits in ("1", "2", "3", "4"):
            cells = [
                of_runs([run["quantizers"][name][bits] for run in runs if name in run["quantizers"]])
                for runs in found.values()
            ]
            rows.append([name, bits, *cells])
    return markdown_table(
        "Quantizers: increase of the loss with all experts at one width", ["quantizer", "bits", *found], rows
    )


def _zetas(found: dict[str, Runs]) -> str:
    methods = ("router_norm, zeta 1.5", "router_norm, zeta 2", "router_norm", "router_norm, zeta 5", "norm_only")
    labels = ("1.5", "2", "3 (the paper's)", "5", "no MaxVar")
    rows = []
    for method, label in zip(methods, labels, strict=True):
        cells = []
        for runs in found.values():
            cells.append(of_runs(values(runs, method)))
            cells.append(of_runs(_difference(runs, (method, "expert"), ("norm_only", "expert"), "mean")))
        rows.append([label, *cells])
    head = ["zeta", *(cell for name in found for cell in (name, "minus no MaxVar"))]
    return markdown_table("MaxVar: the reorder rule's zeta, 2.5 bits from {2, 3}", head, rows)


def _correlations(found: dict[str, Runs]) -> str:
    signals = list(next(iter(found.values()))[0]["correlations"])
    rows = []
    for signal in signals:
        for band in ("all", *BANDS):
            cells = []
            for runs in found.values():
                for suffix in ("", ", within layers"):
                    numbers = [run["correlations"][signal][band + suffix] for run in runs]
                    cells.append(of_runs([n for n in numbers if np.isfinite(n)], 2))
            rows.append([signal, band, *cells])
    head = ["signal", "tokens", *(f"{name}, {scope}" for name in found for scope in ("all experts", "within layers"))]
    return markdown_table("Rank correlation of signals with the measured sensitivity at 2 bits", head, rows)


def _settling(found: dict[str, Runs]) -> str:
    shares = (0.1, 0.25, 0.5, 0.75, 0.9)
    rows = []
    for share in shares:
        cells = []
        for runs in found.values():
            nearest: Callable[[dict[str, Any]], float] = lambda one, share=share: abs(one["share_of_training"] - share)  # type: ignore[misc]  # noqa: E731
            at = [min(run["settling"], key=nearest) for run in runs]
            cells.append(of_runs([one["tau"] for one in at], 2))
            cells.append(of_runs([100 * one["other_bits"] for one in at], 0))
        rows.append([f"{share:.0%}", *cells])
    head = ["share of training", *(f"{name}, {what}" for name in found for what in ("tau", "other bits, %"))]
    return markdown_table("When the paper's plan settles: Kendall's tau with the last record", head, rows)


def _variants(found: dict[str, Runs]) -> str:
    rows = []
    for variant in VARIANTS:
        for granularity in ("expert", "expert+projection"):
            cells = []
            for runs in found.values():
                for key in ("mean", "rare"):
                    top = values(runs, variant, granularity, key=key)
                    bottom = values(runs, "curvature", granularity, key=key)
                    cells.append(between(ratio_of_runs(top, bottom)) if top else "-")
            rows.append([f"{variant}, {granularity}", *cells])
    head = ["costs", *(f"{name}, {key}" for name in found for key in ("all", "rare"))]
    return markdown_table(
        "Other costs than the optimizer's curvature: ratio of the increases (2.5 bits from {2, 3})", head, rows
    )


def _granularities(found: dict[str, Runs]) -> str:
    rows = []
    for method in ("curvature", "sensitivity"):
        for granularity in ("expert+projection", "layer", "layer+projection"):
            cells = []
            for runs in found.values():
                for budget in (2.25, 2.5):
                    top = values(runs, method, granularity, budget=budget)
                    bottom = values(runs, method, "expert", budget=budget)
                    cells.append(between(ratio_of_runs(top, bottom)))
            rows.append([f"{method}, {granularity}", *cells])
    head = ["granularity", *(f"{name}, {budget}" for name in found for budget in ("2.25", "2.5"))]
    return markdown_table("Granularity: ratio of the increase to that of the choice by expert, {2, 3}", head, rows)


def _group_sizes(found: dict[str, Runs]) -> str:
    rows = []
    keys = [(one["widths"], one["stored_bits"]) for one in next(iter(found.values()))[0]["group_sizes"]]
    for widths, stored in dict.fromkeys(keys):
        cells = []
        for runs in found.values():
            by_choice = [
                [
                    one["mean"]
                    for run in runs
                    for one in run["group_sizes"]
                    if (one["widths"], one["stored_bits"]) == (widths, stored)
                    and (" and " in one["group sizes"]) == both
                ]
                for both in (False, True)
            ]
            cells += [of_runs(by_choice[0]), between(ratio_of_runs(by_choice[1], by_choice[0]))]
        rows.append([widths, f"{stored:g}", *cells])
    head = ["widths", "stored bits", *(cell for name in found for cell in (name, "ratio with half the group too"))]
    return markdown_table("The group size as a choice in the knapsack, at equal stored bits", head, rows)
