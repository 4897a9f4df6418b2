"""The tables of dropping_study.py."""

import json
from pathlib import Path
from typing import Any

from benchmarks.studies.dropping_study import BUDGETS, COMPARED
from benchmarks.studies.experts_seen import CRITERIA, PLACES
from benchmarks.studies.study_report import markdown_table, of_runs

HEADER = """# Tables of the study of dropping

Printed by `python -m benchmarks.studies.dropping_study --report`. KL is the mean divergence from the float model's
predictions in nats per token, loss the increase over the float model's, *rare* that on the rarest tenth of the target
tokens. *0 to 4 at 1* is a plan of 1 nominal bit on average that may drop experts; *channels* prunes channels instead
(`python -m benchmarks.studies.channel_study`). Entries are means over seeds ± half
of the 95 % interval; of one or two seeds, means alone.
"""


def report(study: dict[str, Any], root: Path) -> str:
    """All tables as Markdown."""
    parts = [HEADER]
    plans = ["uniform 1", "uniform 2"]
    for budget in BUDGETS:
        plans += [f"{name} at {budget:g}" for name in ("0 to 4", "0 to 4, not calibrated", "1 to 4")]
        plans += [f"{name} at {budget:g}" for name in CRITERIA] if budget in COMPARED else []
    correlations = []
    for name in study["models"]:
        paths = sorted((root / name).glob("seed_*/dropping.json"))
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for path, one in zip(paths, runs, strict=True):
            if (channels := path.with_name("channels.json")).is_file():
                one["results"] += json.loads(channels.read_text(encoding="utf-8"))["results"]
        if not runs:
            continue
        title = f"{study['models'][name]['title']} ({'one seed' if len(runs) == 1 else f'{len(runs)} seeds'})"
        head = ["plan", "stored bits", "dropped", "KL", "loss", "rare", "KL, other text"]
        shown = [(plan, plan, None) for plan in plans]
        shown.insert(
            shown.index(("0 to 4 at 1", "0 to 4 at 1", None)) + 1,
            ("0 to 4 at 1", "0 to 4 at 1, distilled", "distilled"),
        )
        rows = [row for plan, label, fit in shown if (row := _row(runs, plan, label, fit))]
        parts.append(markdown_table(title, head, rows))
        paired = [run for run in runs if any(one["plan"].startswith("channels") for one in run["results"])]
        both = [f"{plan} at {budget:g}" for budget in COMPARED for plan in ("0 to 4", "channels")]
        if rows := [row for plan in both if paired and (row := _row(paired, plan, plan, None))]:
            seeds = "one seed" if len(paired) == 1 else f"{len(paired)} seeds"
            parts.append(
                markdown_table(f"{study['models'][name]['title']}: channels, same seeds ({seeds})", head, rows)
            )
        rows = [row for place in PLACES if (row := _row(runs, f"{place} at 1", place, None))]
        parts.append(markdown_table(f"{title}: what stands in a dropped expert's place, 1 bit on average", head, rows))
        keys = runs[0]["correlations"]
        means = [sum(one["correlations"][key] for one in runs) / len(runs) for key in keys]
        correlations.append([study["models"][name]["title"], *(f"{value:.2f}" for value in means)])
    if not correlations:
        return f"no result in {root}: run the study first"
    head = ["model", *keys]
    parts.append(
        markdown_table("Rank correlation with what an expert's absence costs, within a layer", head, correlations)
    )
    return "\n".join(parts)


def _row(runs: list[dict[str, Any]], plan: str, label: str, fit: str | None) -> list[str]:
    """One line of a table; empty where it was not measured."""
    of = [[one for one in run["results"] if one["plan"] == plan and one.get("fit") == fit] for run in runs]
    found = [one[0] for one in of if one]
    if not found:
        return []
    cells = [("own", "kl"), ("own", "loss"), ("own", "rare"), ("other", "kl")]
    numbers = [[one[text][key] for one in found if text in one] for text, key in cells]
    dropped = [one["dropped"] for one in found if "dropped" in one]
    size = sum(one["stored_bits"] for one in found) / len(found)
    gone = f"{sum(dropped) / len(dropped):.0f}" if dropped else ""
    return [
        label,
        f"{size:.2f}",
        gone,
        *map(of_runs, numbers),
    ]
