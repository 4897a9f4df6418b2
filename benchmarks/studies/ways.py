"""Studies of several ways to the same budgets: one file of results per model and seed, one table per model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.study_models import Setting, folder_of
from benchmarks.studies.study_report import markdown_table, of_runs
from moe_precision.files import replaced_when_done

Way = tuple[float, str]  # a budget in bits, and what was done


def kept(name: str, seed: int, root: Path, file: str, measure: Callable[[], list[dict[str, Any]]]) -> str:
    """Measures a model with a seed, unless its file of results exists; returns what was done.

    Args:
        name: The model's key in the settings.
        seed: Its seed.
        root: Folder of the study.
        file: Name of the file.
        measure: Gives results, each with its ``way``, its ``budget`` and figures.
    """
    result = folder_of(name, seed, root) / file
    if result.is_file():
        return f"{name} {seed}: found"
    found = measure()
    with replaced_when_done(result) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return f"{name} {seed}: done"


def tables(study: Setting, root: Path, file: str, header: str, ways: Sequence[Way], columns: Mapping[str, str]) -> str:
    """All tables as Markdown.

    Args:
        study: The settings.
        root: Folder of the study.
        file: Name of the files of results.
        header: What comes first.
        ways: The rows.
        columns: Key of a figure -> its heading.
    """
    parts = [header]
    for name in study["annealing"]["models"]:
        paths = sorted((root / name).glob(f"seed_*/{file}"))
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if not runs:
            continue
        rows = []
        for budget, way in ways:
            found = [one for run in runs for one in run if (one["budget"], one["way"]) == (budget, way)]
            cells = [[one[key] for one in found] for key in columns]
            means = list(map(of_runs, cells))
            rows.append([f"{budget:g}", way, *means])
        title = f"{study['models'][name]['title']} ({'one seed' if len(runs) == 1 else f'{len(runs)} seeds'})"
        parts.append(markdown_table(title, ["bits", "how", *columns.values()], rows))
    return "\n".join(parts) if len(parts) > 1 else f"no result in {root}: run the study first"
