"""What Weights & Biases gets at the end of a run in addition to scalars: curves, a heatmap, the plan as an artifact."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from moe_precision.plans.plan import PrecisionPlan
from moe_precision.present.figures import plot_change_heatmap
from moe_precision.present.thinning import evenly_thinned
from moe_precision.recording.history import RouterNormHistory

_MAX_POINTS = 500  # per curve in a chart; W&B itself samples lines to 1,500 points
_MAX_ROWS = 10_000  # of a table, and so points of all curves of a chart; W&B cuts off what is above
_NAME_LENGTH = 128  # of an artifact


MEDIA = ("the charts", "the plan", "the settings", "the summary")
"""What `log_media` logs; each may fail alone."""


def log_media(what: str, run: Callable[[], Any], history: RouterNormHistory, plan: PrecisionPlan, path: Path) -> None:
    """Logs one of `MEDIA`.

    Args:
        what: Which one.
        run: Gives the wandb run.
        history: The recorded norms.
        plan: The plan.
        path: Its file.
    """
    to = run()
    if what == "the charts":
        to.log(_charts(history))
    elif what == "the plan":
        to.log_artifact(_artifact(to, plan, path))
    elif what == "the settings":
        to.config.update({"moe_precision": _settings(plan)}, allow_val_change=True)  # of a run that was resumed too
    else:
        to.summary.update({f"precision_plan/{key}": value for key, value in _headline(plan).items()})


def current_run() -> Any:
    """The run that transformers' own WandbCallback has opened, if there is one."""
    return getattr(sys.modules.get("wandb"), "run", None)


def kept_records(records: int, curves: int) -> list[int]:
    """Which of ``records`` a chart of ``curves`` shows: evenly thinned, the first and the last among them.

    Empty where not even two points of each curve are within W&B's limit.
    """
    return evenly_thinned(records, min(_MAX_POINTS, _MAX_ROWS // max(1, curves)))


def _charts(history: RouterNormHistory) -> dict[str, Any]:
    import wandb

    charts: dict[str, Any] = {}
    for index, (name, norms) in enumerate(history.norms.items()):
        kept, experts = kept_records(*norms.shape), range(norms.shape[1])
        if kept:
            charts[f"router_norm_curves/layer_{index:02d}"] = wandb.plot.line_series(
                xs=[history.steps[i] for i in kept],
                ys=[norms[kept, expert].tolist() for expert in experts],
                keys=[f"expert_{expert:03d}" for expert in experts],
                title=f"router L2 norm, {name}",
                xname="optimizer step",
            )
    charts["router_norm_change/heatmap"] = wandb.Image(plot_change_heatmap(history))
    return charts


def _headline(plan: PrecisionPlan) -> dict[str, Any]:
    return {"average_bits": plan.average_bits, "stored_bits": plan.stored_bits, "method": plan.method}


def _settings(plan: PrecisionPlan) -> dict[str, Any]:
    """What was asked of the plan, for the run's config: runs can be filtered and grouped by it."""
    asked = {} if plan.settings is None else plan.settings.to_dict()
    return asked | {"method": plan.method, "group_size": plan.group_size}


def _artifact(run: Any, plan: PrecisionPlan, path: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(artifact_name(run.id), type="precision-plan", metadata=_headline(plan))
    artifact.add_file(str(path))
    return artifact


def artifact_name(run_id: str) -> str:
    """A name that W&B takes, another one for every run: of letters, digits, ``_``, ``-`` and ``.``, and short."""
    name = f"precision-plan-{run_id}"
    clean = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    if clean == name and len(name) <= _NAME_LENGTH:
        return name
    code = xxhash.xxh3_64(run_id.encode()).hexdigest()[:8]
    return f"{clean[: _NAME_LENGTH - len(code) - 1]}-{code}"
