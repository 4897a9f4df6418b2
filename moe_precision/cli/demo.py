"""The whole way in one command: train a small Mixtral, make its plan, quantize, reload, compare.

Every row of the table is a folder that was written to disk and loaded again with ``from_pretrained``. Beside the
plan there are uniform widths, the paper's order with its controls, and what each step of the quantizer brings.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from ..allocation.allocator import allocate, make_plan
from ..allocation.replanning import replan
from ..checkpoints.checkpoint import Checkpoint
from ..judging.divergence import Divergence
from ..judging.evaluation import Evaluation, summarize_losses
from ..judging.reference import Reference
from ..plans.beside import PlanFiles
from ..plans.methods import MethodName
from ..plans.plan import PrecisionPlan
from ..present.figures import plot_router_norms
from ..present.tables import show
from ..quantize.distilling import STEPS
from ..quantize.writer import distill_checkpoint, quantize_checkpoint
from ..recording.curvature import Curvature
from ..recording.history import RouterNormHistory
from ..recording.statistics import ExpertStatistics
from .fit import train
from .options import Commands, add_command, positive

_ORDERS: dict[str, MethodName] = {
    "paper's order": "router_norm",
    "reversed order": "reversed",
    "random order": "random",
}
_SMALLER = (2.0, 1.5)  # bits, for plans beside the recipe's
_RECIPE_ROOT = "runs/pretrain_mixtral"
_FOLDER_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class _Variant:
    """One quantized model of the table.

    Attributes:
        plan: Its plan.
        statistics: Its fit rounds under the experts' statistics, as the quantize step does by default.
        distilled: Its scales are distilled then.
    """

    plan: PrecisionPlan
    statistics: bool = True
    distilled: bool = False


@dataclass(frozen=True)
class Row:
    """One model of the table; ``nominal_bits`` and ``divergence`` are None for the float model."""

    model: str
    nominal_bits: float | None
    stored_bits: float
    file_mb: float
    evaluation: Evaluation
    divergence: Divergence | None


def run_demo(output: Path, max_steps: int | None = None) -> list[Row]:
    """Trains, plans, quantizes and evaluates; prints the table and leaves everything in ``output``.

    Args:
        output: Folder of the run.
        max_steps: Optimizer steps; None takes the recipe's. Scales are distilled for no more.

    Returns:
        The rows of the table.
    """
    disable_progress_bar()  # transformers' own, one for each of many small loads and saves
    output.mkdir(parents=True, exist_ok=True)
    config = output / "recipe.yaml"
    config.write_text(yaml.safe_dump(_moved(yaml.safe_load(_recipe()), str(output))), encoding="utf-8")
    data = train(["--config", str(config), *([] if max_steps is None else ["--trainer.max_steps", str(max_steps)])])

    run = PlanFiles.of(output / "precision_plan.json")
    checkpoint, history = output / "checkpoint", RouterNormHistory.load(run.history)
    plan = PrecisionPlan.load(run.plan)
    picture = output / "router_norms.png"
    plot_router_norms(history, plan).savefig(picture, dpi=120)

    statistics, curvature = ExpertStatistics.load(run.statistics), Curvature.load(run.curvature)
    variants = _variants(plan, history)
    rows = []
    reference: Reference | None = None  # the first row, the float model's
    for name, variant in {"float": None, **variants}.items():
        folder, chosen = checkpoint, None
        if variant is not None:
            chosen, folder = variant.plan, output / f"quantized-{_FOLDER_NAME.sub('-', name).strip('-')}"
            under = statistics if variant.statistics else None
            first = folder.with_name(f"{folder.name}-undistilled") if variant.distilled else folder
            quantize_checkpoint(checkpoint, chosen, first, curvature=curvature, statistics=under)
            if variant.distilled:
                distill_checkpoint(
                    checkpoint, first, folder, data.train_dataloader(), steps=min(STEPS, max_steps or STEPS)
                )
                shutil.rmtree(first)
        written = Checkpoint(folder)
        model = written.load(dtype=torch.float32)  # float32 activations: compares weights, not rounding
        if reference is None:
            reference = Reference(model, data.val_dataloader(), name=f"Evaluating {name}")
            losses, divergence = reference.losses, None
        else:
            measured = reference.measure(model, f"Evaluating {name}")
            losses, divergence = measured.losses, measured.divergence
        rows.append(
            Row(
                model=name,
                nominal_bits=None if chosen is None else chosen.average_bits,
                stored_bits=written.stored_bits_per_expert_weight(plan),
                file_mb=sum(file.stat().st_size for file in written.files) / 1e6,
                evaluation=summarize_losses(losses, reference.targets, data.token_counts),
                divergence=divergence,
            )
        )
    (output / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    show(_table(rows))
    print(
        f"stored bits: bytes of all expert tensors in the file, per expert weight. Losses in nats over "
        f"{rows[0].evaluation.tokens} validation tokens of\n"
        "the source of Python's standard library, in files that were not trained on;\n"
        "rare: the tenth of them seen least in training. KL: divergence from the float model's predictions, mean nats\n"
        "per token; top-1: how often both find the same token most likely. Orders have as many experts at 2 and at\n"
        f"3 bits; random: one draw. plan: method {plan.method}, least predicted loss. All rows but the first two\n"
        "round under the statistics of the experts' inputs. distilled: then scales are trained, codes kept.\n\n"
        f"In {output}: precision_plan.json, precision_plan.{{history,curvature,statistics}}.safetensors,\n"
        "router_norms.png, results.json, "
        "checkpoint/ (float), quantized-*/ (packed), checkpoints/ (to resume), wandb/ (offline run)"
    )
    return rows


def _variants(plan: PrecisionPlan, history: RouterNormHistory) -> dict[str, _Variant]:
    """What the table compares, by name."""
    assert plan.settings is not None
    found: dict[str, _Variant] = {}
    for under in (False, True):
        for level in (3, 2):
            uniform = allocate(history=history, method="uniform", average_bits=level, group_size=plan.group_size)
            found[f"uniform {level} bits" + ("" if under else ", no statistics")] = _Variant(uniform, statistics=under)
    for name, method in _ORDERS.items():
        order = replace(plan.settings, method=method, bits=None, granularity=None)
        found[name] = _Variant(make_plan(order, history=history))
    found["plan"] = _Variant(plan)
    for bits in _SMALLER:
        smaller = replan(plan, average_bits=bits)
        found[f"plan, {bits:g} bits"] = _Variant(smaller)
        found[f"plan, {bits:g} bits, distilled"] = _Variant(smaller, distilled=True)
    return found


def _recipe() -> str:
    return files("moe_precision.recipes").joinpath("pretrain_mixtral.yaml").read_text(encoding="utf-8")


def _moved(node: Any, folder: str) -> Any:
    """The recipe with its folder replaced in every path."""
    if isinstance(node, dict):
        return {key: _moved(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, folder) for value in node]
    return node.replace(_RECIPE_ROOT, folder) if isinstance(node, str) else node


def _table(rows: list[Row]) -> Table:
    table = Table(box=box.MARKDOWN)
    sizes = ("nominal bits", "stored bits", "file MB")
    for column in ("model", *sizes, "KL", "top-1", "loss", "perplexity", "rare loss", "rare perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        e, d = row.evaluation, row.divergence
        nominal = "-" if row.nominal_bits is None else f"{row.nominal_bits:.2f}"
        sizes = (nominal, f"{row.stored_bits:.2f}", f"{row.file_mb:.2f}")
        losses = (f"{e.loss:.4f}", f"{e.perplexity:.3f}", f"{e.rare_loss:.4f}", f"{e.rare_perplexity:.1f}")
        distance = ("-", "-") if d is None else (f"{d.kl:.5f}", f"{d.top1:.1%}")
        table.add_row(row.model, *sizes, *distance, *losses)
    return table


def run(options: argparse.Namespace) -> None:
    """Runs the demo."""
    run_demo(Path(options.output), options.max_steps)


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "demo",
        run,
        "moe-precision demo --output runs/demo",
    )
    command.add_argument("--output", default="runs/demo", help="folder of the run (default runs/demo)")
    command.add_argument("--max-steps", type=positive, help="optimizer steps (default: the recipe's)")
