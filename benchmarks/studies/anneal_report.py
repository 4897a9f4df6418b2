"""The tables of docs/annealing-tables.md, from the results of anneal_study.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.anneal_study import PLANS
from benchmarks.studies.study_report import between, markdown_table, of_runs
from moe_precision.judging.statistics import ratio_of_runs

KEYS = (("all", "mean"), ("rare", "rare"))
HEADER = """# Tables of annealing

Printed by `python -m benchmarks.studies.anneal_study --report`; [evidence.md](evidence.md) says what they mean. Entries
are nats per token, means over seeds ± half of the 95 % interval; *rare* is the tenth of the target tokens seen least
in training.
"""

Runs = list[dict[str, Any]]  # the results of one model, one per seed


def load(study: dict[str, Any], root: Path) -> dict[str, Runs]:
    """Results by model, as far as they exist."""
    found = {}
    for name in study["annealing"]["models"]:
        paths = sorted((root / name).glob("seed_*/annealing.json"))
        if paths:
            found[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return found


def increases(runs: Runs, key: str, float_key: str, band: str = "mean") -> list[float]:
    """For each seed, the loss of a result minus that of the float model after as many steps."""
    return [run[key][band] - run[float_key][band] for run in runs if key in run and float_key in run]


def report(study: dict[str, Any], root: Path) -> str:
    """All tables as Markdown."""
    found = load(study, root)
    if not found:
        return f"no result in {root}: run the study first"
    settings = study["annealing"]
    detailed = {name: runs for name, runs in found.items() if name in settings["detailed"]}
    return "\n".join(
        [
            HEADER,
            _ends(settings, found),
            _gains(settings, found),
            _plans(settings, detailed),
            _plan_ratios(settings, detailed),
            _scales(settings, detailed),
            _scale_differences(settings, detailed),
            _recovered(settings, detailed),
        ]
    )


def _cells(found: dict[str, Runs], key: str, float_key: str) -> list[str]:
    return [of_runs(increases(runs, key, float_key, band)) for runs in found.values() for _, band in KEYS]


def _head(*first: str, found: dict[str, Runs]) -> list[str]:
    return [*first, *(f"{name}, {title}" for name in found for title, _ in KEYS)]


def _ends(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    longest = max(settings["shares"])
    rows = []
    for budget in settings["budgets"]:
        rows.append([f"{budget:g}", "quantized afterwards", *_cells(found, f"afterwards {budget}", f"float {longest}")])
        name = f"experts quantized, routers alone trained, last {longest:.0%}"
        rows.append([f"{budget:g}", name, *_cells(found, f"routers {budget}", f"float {longest}")])
        for share in settings["shares"]:
            cells = _cells(found, f"annealed {share} {budget}", f"float {share}")
            rows.append([f"{budget:g}", f"annealed, last {share:.0%}", *cells])
    title = "Training that ends on the plan: increase of the loss over the float model after as many steps"
    return markdown_table(title, _head("bits", "how", found=found), rows)


def _gains(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    longest = max(settings["shares"])
    rows = []
    for budget in settings["budgets"]:
        cells = []
        for runs in found.values():
            both = [run for run in runs if f"annealed {longest} {budget}" in run and f"afterwards {budget}" in run]
            top = increases(both, f"annealed {longest} {budget}", f"float {longest}")
            bottom = increases(both, f"afterwards {budget}", f"float {longest}")
            cells.append(between(ratio_of_runs(top, bottom)) if top else "-")
        rows.append([f"{budget:g}", *cells])
    title = f"Ratio of the increases: annealed over the last {longest:.0%}, to quantized afterwards (all tokens)"
    return markdown_table(title, ["bits", *found], rows)


def _plans(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    longest = max(settings["shares"])
    levels = ", ".join(map(str, settings["plan_bits"]))
    rows = []
    for budget in settings["plan_budgets"]:
        for method in PLANS:
            for how, key in (("afterwards", f"afterwards {method} {budget}"), ("annealed", f"plan {method} {budget}")):
                rows.append([f"{budget:g}", method, how, *_cells(found, key, f"float {longest}")])
    title = f"Does the plan still matter? By expert, from {{{levels}}}, annealed over the last {longest:.0%} or not"
    return markdown_table(title, _head("bits", "plan", "quantized", found=found), rows)


def _plan_ratios(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    control = f"float {max(settings['shares'])}"
    rows = []
    for budget in settings["plan_budgets"]:
        for method in PLANS[1:]:
            cells = []
            for runs in found.values():
                for kind in ("afterwards", "plan"):
                    first = increases(runs, f"{kind} {PLANS[0]} {budget}", control)
                    other = increases(runs, f"{kind} {method} {budget}", control)
                    cells.append(between(ratio_of_runs(first, other)))
            rows.append([f"{budget:g}", method, *cells])
    head = ["bits", "to", *(f"{name}, {how}" for name in found for how in ("afterwards", "annealed"))]
    return markdown_table(f"By plan: {PLANS[0]}'s increase as a ratio to the others' (all tokens)", head, rows)


def _scales(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    longest = max(settings["shares"])
    ways = (
        ("fixed at the start", f"annealed {longest}"),
        ("refitted every 10 steps", "refitted"),
        ("learned", "learned"),
    )
    rows = [
        [f"{budget:g}", name, *_cells(found, f"{key} {budget}", f"float {longest}")]
        for budget in settings["scale_budgets"]
        for name, key in ways
    ]
    title = f"Scales while annealing over the last {longest:.0%}"
    return markdown_table(title, _head("bits", "scales", found=found), rows)


def _scale_differences(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    fixed = f"annealed {max(settings['shares'])}"
    rows = [
        [f"{budget:g}", key, *_cells(found, f"{key} {budget}", f"{fixed} {budget}")]
        for budget in settings["scale_budgets"]
        for key in ("refitted", "learned")
    ]
    return markdown_table(
        "Scales: difference to fixed scales, paired by seed", _head("bits", "scales", found=found), rows
    )


def _recovered(settings: dict[str, Any], found: dict[str, Runs]) -> str:
    rows: list[Sequence[str]] = []
    recover = settings["recover"]
    longest = max(recover["steps"])
    ways = [("quantized", "recover quantized"), (f"routers alone, {longest} steps", f"recover routers {longest}")]
    ways += [(f"annealed, {steps} steps", f"recover annealed {steps}") for steps in recover["steps"]]
    ways.append((f"float, {longest} steps, then quantized", f"recover float {longest} quantized"))
    for budget in recover["budgets"]:
        rows += [[f"{budget:g}", name, *_cells(found, f"{key} {budget}", "recover float 0")] for name, key in ways]
    for steps in recover["steps"]:
        rows.append(["16", f"float, {steps} steps", *_cells(found, f"recover float {steps}", "recover float 0")])
    title = "A finished model, fine-tuned further: change of the loss against the finished float model"
    return markdown_table(title, _head("bits", "how", found=found), rows)
