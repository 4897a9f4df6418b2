"""What Weights & Biases gets at the end of a run in addition to scalars: curves, a heatmap, the plan as an artifact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from moe_precision.plans.plan import PrecisionPlan
from moe_precision.present.figures import plot_change_heatmap
from moe_precision.recording.history import RouterNormHistory

_MAX_POINTS = 500  # per curve in a chart; W&B itself samples lines to 1,500 points


def log_to_wandb(logger: Logger, history: RouterNormHistory, plan: PrecisionPlan, path: Path) -> None:
    """Logs charts and the plan's artifact to a WandbLogger; does nothing for another logger.

    The class is compared by name, because ``lightning.pytorch`` and ``pytorch_lightning`` each have their own.
    """
    if type(logger).__name__ == "WandbLogger":
        log_to_run(logger.experiment, history, plan, path)  # type: ignore[attr-defined]


def log_to_run(run: Any, history: RouterNormHistory, plan: PrecisionPlan, path: Path) -> None:
    """Logs charts and the plan's artifact to a wandb run."""
    import wandb

    stride = -(-len(history.steps) // _MAX_POINTS)
    kept = sorted({*range(0, len(history.steps), stride), len(history.steps) - 1})
    steps = [history.steps[i] for i in kept]
    charts: dict[str, Any] = {}
    for index, (name, norms) in enumerate(history.norms.items()):
        experts = range(norms.shape[1])
        charts[f"router_norm_curves/layer_{index:02d}"] = wandb.plot.line_series(
            xs=steps,
            ys=[norms[kept, expert].tolist() for expert in experts],
            keys=[f"expert_{expert:03d}" for expert in experts],
            title=f"router L2 norm, {name}",
            xname="optimizer step",
        )
    charts["router_norm_change/heatmap"] = wandb.Image(plot_change_heatmap(history))
    run.log(charts)
    headline = {"average_bits": plan.average_bits, "stored_bits": plan.stored_bits, "method": plan.method}
    artifact = wandb.Artifact(f"precision-plan-{run.id}", type="precision-plan", metadata=headline)
    artifact.add_file(str(path))
    run.log_artifact(artifact)
    run.summary.update({f"precision_plan/{key}": value for key, value in headline.items()})


def current_run() -> Any:
    """The run that transformers' own WandbCallback has opened, if there is one."""
    return getattr(sys.modules.get("wandb"), "run", None)
