"""The tables of rounding_study.py: means over seeds with 95 % intervals, and ratios to the fit without statistics."""

import json
from pathlib import Path
from typing import Any

from benchmarks.studies.rounding_study import BUDGETS, LAYERS, LOGITS, NONE, ROUNDED, UNIFORM
from benchmarks.studies.study_report import between, markdown_table, of_runs
from moe_precision.judging.statistics import ratio_of_runs

HEADER = """# Tables of the study of rounding

Printed by `python -m benchmarks.studies.rounding_study --report`. KL is the mean divergence from the float model's
predictions in nats per token, loss the increase over the float model's, *rare* that on the rarest tenth of the target
tokens. *Other text* was not seen by the statistics, and not in the last training. Entries are means over seeds ± half
of the 95 % interval, or ratios of means with their interval; of one or two seeds, means and ratios alone.
"""

Runs = list[dict[str, Any]]  # the results of one model, one per seed


def values(runs: Runs, plan: str, fit: str, text: str, key: str) -> list[float]:
    """One number per seed; empty where it was not measured."""
    found = [one for run in runs for one in run["results"] if (one["plan"], one["fit"]) == (plan, fit) and text in one]
    return [float(one[text][key]) for one in found]


def report(study: dict[str, Any], root: Path) -> str:
    """All tables as Markdown."""
    parts = [HEADER]
    found: dict[str, Runs] = {}
    for name in study["models"]:
        paths = sorted((root / name).glob("seed_*/rounding.json"))
        if paths:
            found[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found:
        return f"no result in {root}: run the study first"
    parts.append(_ratios(study, found))
    plans = [f"uniform {bits}" for bits in UNIFORM]
    plans += [f"{method} {budget:g}" for budget in BUDGETS for method in ("curvature", "uncalibrated", "statistics")]
    for name, runs in found.items():
        rows = []
        for plan in plans:
            for fit in (NONE, ROUNDED, LAYERS, LOGITS):
                if not values(runs, plan, fit, "own", "kl"):
                    continue
                cells = [("own", "kl"), ("own", "loss"), ("own", "rare"), ("other", "kl"), ("other", "loss")]
                numbers = [of_runs(values(runs, plan, fit, *cell), 5) for cell in cells]
                stored = next(one["stored_bits"] for one in runs[0]["results"] if one["plan"] == plan)
                top1 = values(runs, plan, fit, "own", "top1")
                rows.append([plan, f"{stored:.2f}", fit, *numbers, f"{sum(top1) / len(top1):.1%}"])
        head = ["plan", "stored bits", "fit", "KL", "loss", "rare", "KL, other text", "loss, other text", "top-1"]
        title = f"{study['models'][name]['title']} ({'one seed' if len(runs) == 1 else f'{len(runs)} seeds'})"
        parts.append(markdown_table(title, head, rows))
    return "\n".join(parts)


def _ratios(study: dict[str, Any], found: dict[str, Runs]) -> str:
    """What statistics and distilling leave of the KL of today's fit."""

    def ratios(runs: Runs, plan: str, base: list[float], text: str) -> list[str]:
        fits = (ROUNDED, LAYERS, LOGITS)
        found = [ratio_of_runs(values(runs, plan, fit, text, "kl"), base) for fit in fits]
        return [f"{ratio.value:.2f}" if len(runs) < 3 else between(ratio) for ratio in found]

    rows = []
    for name, runs in found.items():
        title = study["models"][name]["title"]
        for text in ("own", "other"):
            for plan in (f"uniform {bits}" for bits in UNIFORM):
                if base := values(runs, plan, NONE, text, "kl"):
                    rows.append([title, text, plan, *ratios(runs, plan, base, text)])
            if base := values(runs, "curvature 2.5", NONE, text, "kl"):
                rows.append(
                    [title, text, "statistics 2.5 ÷ curvature 2.5", *ratios(runs, "statistics 2.5", base, text)]
                )
    head = ["model", "text", "plan", ROUNDED, LAYERS, LOGITS]
    return markdown_table("KL divided by that of the same plan without statistics", head, rows)
