"""``moe-precision plan``: a plan without training, from a history, a checkpoint, or two of them."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ..allocation.allocator import make_plan
from ..checkpoints.checkpoint import Checkpoint, load_model
from ..checkpoints.sources import StreamingError
from ..files import check_writable
from ..layers.moe_layers import find_moe_layers
from ..plans.beside import PlanFiles, existing
from ..plans.methods import PLAN_METHODS, reads
from ..plans.plan import PrecisionPlan
from ..plans.settings import PlanSettings
from ..present.tables import plan_table, show
from ..recording.curvature import Curvature
from ..recording.gradients import curvature_of_losses
from ..recording.history import RouterNormHistory
from .options import Commands, add_command, add_dataset, add_plan_settings, data_of, positive, settings_of


def run(options: argparse.Namespace) -> None:
    """Makes the plan, writes it, and prints it."""
    if Path(options.output).exists():
        raise FileExistsError(f"{options.output!r} exists; name another file with -o")
    check_writable(options.output)
    if options.curvature_batches is not None and (path := PlanFiles.of(options.output).curvature).exists():
        raise FileExistsError(f"{str(path)!r} exists; name another file with -o")
    plan, curvature = _allocated(options)
    if curvature is not None:
        path = PlanFiles.of(options.output).curvature
        curvature.save(path)
        print(f"wrote {path}")
    plan.save(options.output)
    show(plan_table(plan))
    print(f"wrote {options.output}")


def _allocated(options: argparse.Namespace) -> tuple[PrecisionPlan, Curvature | None]:
    """The plan of what the command names, a history, one checkpoint, or two, and curvature that was made for it."""
    source, initial, final = options.source, options.initial, options.final
    if source is None and final is None:
        raise ValueError("give a history, a checkpoint folder, or --final with --initial; see --help")
    if source is not None and initial is not None:
        raise ValueError("--initial replaces the history; give one of them")
    if source is not None and Path(source).is_dir():
        if final is not None:
            raise ValueError(f"{source!r} is a checkpoint folder: give it with --initial to measure from it to --final")
        source, final = None, source
    settings = settings_of(options)
    for folder in (initial, final):
        if folder is not None:
            Checkpoint(folder)  # before any work
    curvature: Curvature | str | Path | None = options.curvature
    if curvature is None and options.curvature_batches is None and reads(settings.method, "curvature"):
        curvature = existing("curvature", source)
    made = None
    if options.curvature_batches is not None:
        if final is None:
            raise ValueError("--curvature-batches takes gradients on the trained model: give its checkpoint")
        made = curvature = _curvature_by_batches(options, settings, final, source)
    history = source if source is not None else initial
    try:
        return make_plan(settings, final, history, curvature), made
    except StreamingError as error:
        if initial is not None:
            raise
        print(f"{error}: loading the whole model instead", file=sys.stderr)
        return make_plan(settings, load_model(final), history, curvature), made


def _curvature_by_batches(
    options: argparse.Namespace, settings: PlanSettings, checkpoint: str, history: str | None
) -> Curvature:
    """Squared gradients of a checkpoint on training batches, after all checks of the plan."""
    if options.curvature is not None:
        raise ValueError("--curvature and --curvature-batches are two sources of the same values; give one")
    patterns = settings.patterns
    if not patterns and history is not None:
        patterns = RouterNormHistory.load(history).patterns
    model = load_model(checkpoint, dtype="float32")
    layers = find_moe_layers(model.train(), **patterns)
    settings.check_fits({layer.name: layer.shape for layer in layers})
    data = data_of(options, checkpoint, model)
    batches = islice(data.train_dataloader(), options.curvature_batches)
    bar = tqdm(batches, desc="gradients", total=options.curvature_batches, unit="batch", disable=None)
    losses = (partial(lambda batch: model(**batch).loss, batch) for batch in bar)
    return curvature_of_losses(layers, losses)


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "plan",
        run,
        "Make a plan without training again: with other bits from the norms that a run recorded, or from two "
        "checkpoints, before and after a fine-tuning that was not recorded. Checkpoints are read tensor by tensor.",
        "moe-precision plan runs/demo/precision_plan.history.safetensors --average-bits 2.25 --bits 2 3 "
        "--group-size 64 -o plan_2.25.json\n"
        "  moe-precision plan --initial base-model --final finetuned-model -o plan.json",
    )
    command.add_argument(
        "source",
        nargs="?",
        help="the history beside a plan (x.history.safetensors), or a checkpoint folder: without a history, experts "
        "are ranked by their final norms and the plan notes it",
    )
    command.add_argument("--initial", metavar="FOLDER", help="the checkpoint that training started from")
    command.add_argument(
        "--final", metavar="FOLDER", help="the trained checkpoint; with a history, gives last norms and variances"
    )
    add_plan_settings(command, PLAN_METHODS)
    command.add_argument(
        "--curvature",
        metavar="FILE",
        help="x.curvature.safetensors, for --method curvature (default: the one beside the history, if any)",
    )
    command.add_argument(
        "--curvature-batches",
        type=positive,
        metavar="N",
        help="take the curvature from squared gradients of the checkpoint on N training batches, where the optimizer "
        "kept none; written beside the plan",
    )
    add_dataset(command)
    command.add_argument("-o", "--output", default="precision_plan.json", help="default precision_plan.json")
