"""``moe-precision plan``: a plan without training, from a history, a checkpoint, or two of them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from ..allocation.allocator import make_plan
from ..allocation.calibration import Calibration, calibration_on
from ..allocation.whole_model import with_rest
from ..checkpoints.checkpoint import Checkpoint, load_model
from ..checkpoints.hub import how_to_download, is_hub_name, local_folder
from ..checkpoints.sources import StreamingError
from ..files import check_writable
from ..layers.moe_layers import find_moe_layers
from ..plans.beside import Kind, PlanFiles
from ..plans.methods import AUTO, PLAN_METHODS, reads
from ..plans.plan import PrecisionPlan
from ..plans.settings import PlanSettings
from ..present.plan_summary import plan_document, plan_lines
from ..recording.collecting import collect_statistics
from ..recording.curvature import Curvature
from ..recording.gradients import curvature_of_losses
from ..recording.history import RouterNormHistory
from ..recording.statistics import ExpertStatistics
from .found import KINDS, beside_history
from .options import (
    Commands,
    add_command,
    add_dataset,
    add_output,
    add_plan_settings,
    data_of,
    dataset_name,
    positive,
    settings_of,
)


@dataclass
class _Known:
    """What costs are measured by, and what of it was made now, to be written beside the plan."""

    curvature: Curvature | Path | str | None = None
    statistics: ExpertStatistics | Path | str | None = None
    model: PreTrainedModel | None = None
    calibration: Calibration | None = None


def run(options: argparse.Namespace) -> None:
    """Makes the plan, writes it, and prints it."""
    files = PlanFiles.of(options.output)  # ends in .json, so that the files beside it are found
    made = (files.curvature, options.curvature_batches), (files.statistics, options.statistics_batches)
    for path in (files.plan, *(path for path, batches in made if batches is not None)):
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists; name another file with -o")
    check_writable(options.output)
    plan, known = _allocated(options)
    if isinstance(known.curvature, Curvature):
        known.curvature.save(files.curvature)
        print(f"wrote {files.curvature}")
    if isinstance(known.statistics, ExpertStatistics):
        known.statistics.save(files.statistics)
        print(f"wrote {files.statistics} ({known.statistics.described()})")
    plan.save(options.output)
    options.document = {**plan_document(plan), "wrote": str(options.output)}
    print("\n".join(plan_lines(plan)))
    print(f"wrote {options.output}")
    elsewhere = {"--curvature": known.curvature, "--statistics": known.statistics}
    named = {option: Path(path) for option, path in elsewhere.items() if isinstance(path, Path | str)}
    given = [f"{option} {path}" for option, path in named.items() if path not in files.all]
    given = given if reads(plan.method, "curvature") else []
    given += [] if options.non_expert_bits is None else [f"--non-expert-bits {options.non_expert_bits}"]
    if given:
        print(f"give quantize what this plan was made with: {' '.join(given)}")


def _allocated(options: argparse.Namespace) -> tuple[PrecisionPlan, _Known]:
    """The plan of what the command names, a history, one checkpoint, or two, and what costs were measured by."""
    given = options.source, options.initial, options.final
    source, initial, final = (None if path is None else str(local_folder(path)) for path in given)
    if source is None and final is None:
        raise ValueError("give a history, a checkpoint folder, or --final with --initial; see --help")
    if source is not None and initial is not None:
        raise ValueError("--initial replaces the history; give one of them")
    if source is not None and is_hub_name(source):
        raise ValueError(f"{source!r} is neither a history nor a checkpoint folder; {how_to_download(source)}")
    if source is not None and Path(source).is_dir():
        if final is not None:
            raise ValueError(f"{source!r} is a checkpoint folder: give it with --initial to measure from it to --final")
        source, final = None, source
    settings = settings_of(options)
    if options.non_expert_bits is not None and settings.total_gib is None:
        raise ValueError(
            "--non-expert-bits is for --total-gib here, which counts the other layers; give it to quantize"
        )
    for folder in (initial, final):
        if folder is not None:
            Checkpoint(folder)  # before any work
    if final is not None:
        settings = with_rest(settings, final, options.non_expert_bits)
    known = _known(options, settings, final, source)
    history = source if source is not None else initial
    sources = known.curvature, known.statistics
    if known.model is not None:
        plan = make_plan(settings, known.model, history, *sources, known.calibration)
        plan.notes["final"] = Checkpoint(str(final)).name
        plan.notes["text"] = f"training batches of {dataset_name(options)}"
        return plan, known
    try:
        return make_plan(settings, final, history, *sources), known
    except StreamingError as error:
        if initial is not None:
            raise
        print(f"{error}: loading the whole model instead", file=sys.stderr)
        trained = Checkpoint(str(final))
        plan = make_plan(settings, load_model(trained), history, *sources)
        plan.notes["final"] = trained.name
        return plan, known


def _known(options: argparse.Namespace, settings: PlanSettings, final: str | None, history: str | None) -> _Known:
    """Files that are named or stand beside the history, where the method reads them; or taken from batches now."""
    found = _Known(options.curvature, options.statistics)
    looked_for: list[Kind] = []
    for kind in KINDS:
        file, batches = getattr(options, kind), getattr(options, f"{kind}_batches")
        if batches is None:
            if file is None and (settings.method == AUTO or reads(settings.method, kind)):
                looked_for.append(kind)
        elif file is not None:
            raise ValueError(f"--{kind} and --{kind}-batches are two sources of one thing; give one")
        elif final is None:
            raise ValueError(f"--{kind}-batches runs the trained model: give its checkpoint")
    if history is not None:
        of = final if settings.method == AUTO else None  # a method that needs the file says what is wrong
        for beside, path in beside_history(looked_for, history, of).items():
            setattr(found, beside, path)
    missing = [kind for kind in KINDS if getattr(found, kind) is None and not getattr(options, f"{kind}_batches")]
    if settings.may_drop and missing:
        raise ValueError(
            f"0 bits drop an expert, which needs curvature and statistics: give --{missing[0]} or "
            f"--{missing[0]}-batches, or levels from 1"
        )
    if final is not None and (options.curvature_batches or options.statistics_batches):
        _run_batches(options, settings, final, history, found)
    return found


def _run_batches(
    options: argparse.Namespace, settings: PlanSettings, checkpoint: str, history: str | None, found: _Known
) -> None:
    """Takes what was asked for from a checkpoint on training batches, after all checks of the plan."""
    patterns = settings.patterns
    if not patterns and history is not None:
        patterns = RouterNormHistory.load(history).patterns
    data = data_of(options, checkpoint)
    model = load_model(checkpoint, dtype="float32")
    layers = find_moe_layers(model, **patterns)
    settings.check_fits({layer.name: layer.shape for layer in layers})
    found.model = model
    if (asked := options.statistics_batches) is not None:
        batches = list(islice(data.train_dataloader(), asked))
        text = f"{asked} training batches of {dataset_name(options)}"
        found.statistics = collect_statistics(model, batches, text=text, **patterns)
    if (asked := options.curvature_batches) is not None:
        model.train()
        bar = tqdm(islice(data.train_dataloader(), asked), desc="gradients", total=asked, unit="batch", disable=None)
        losses = (partial(lambda batch: model(**batch).loss, batch) for batch in bar)
        found.curvature = curvature_of_losses(layers, losses)
        model.zero_grad(set_to_none=True)
    model.eval()
    if settings.method == AUTO or settings.knows_costs:
        found.calibration = calibration_on(model, data.train_dataloader())


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "plan",
        run,
        "moe-precision plan runs/demo/precision_plan.history.safetensors --average-bits 2.25 --bits 2 3 "
        "--group-size 64 -o plan_2.25.json\n"
        "  moe-precision plan --initial base-model --final finetuned-model -o plan.json\n"
        "  moe-precision plan model --curvature-batches 32 --statistics-batches 32 --average-bits 2 -o plan.json",
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
        "--non-expert-bits",
        type=int,
        choices=[4, 8],
        help="quantize will be given this for the other linear layers, which leaves more of --total-gib for experts",
    )
    command.add_argument(
        "--curvature",
        metavar="FILE",
        help="x.curvature.safetensors, for the methods that read it (default: the one beside the history, if any)",
    )
    command.add_argument(
        "--statistics",
        metavar="FILE",
        help="x.statistics.safetensors, for the methods that read it (default: the one beside the history, if any)",
    )
    command.add_argument(
        "--curvature-batches",
        type=positive,
        metavar="N",
        help="take the curvature from squared gradients of the checkpoint on N training batches, where the optimizer "
        "kept none; written beside the plan",
    )
    command.add_argument(
        "--statistics-batches",
        type=positive,
        metavar="N",
        help="take the experts' statistics from N training batches, with the whole float model in memory; written "
        "beside the plan",
    )
    add_dataset(command)
    command.add_argument("-o", "--output", default="precision_plan.json", help="default precision_plan.json")
    add_output(command)
