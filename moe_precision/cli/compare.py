"""``moe-precision compare``: every method on your own model, at equal stored bits, with a verdict in words."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import load_model
from ..files import check_writable, replaced_when_done
from ..plans.beside import PlanFiles
from ..plans.levels import check_levels
from ..plans.methods import ALL_METHODS, METHODS
from ..plans.numbers import AllocationError
from ..plans.widths import GRANULARITIES
from ..recording.curvature import Curvature
from ..recording.history import RouterNormHistory
from ..recording.statistics import ExpertStatistics
from .found import KINDS, beside_history
from .options import (
    Commands,
    add_command,
    add_dataset,
    add_heldout,
    add_levels,
    add_output,
    count,
    data_of,
    judged_on,
    positive,
)


def run(options: argparse.Namespace) -> None:
    """Compares, prints the tables and the verdict, and writes what was asked for."""
    from ..judging.compare import compare
    from ..judging.verdict import verdict
    from ..present.figures import plot_comparison
    from ..present.tables import comparison_table, correlation_table, show

    outputs = _checked_outputs(options)
    history = None if options.history is None else RouterNormHistory.load(options.history)
    path_of_curvature, path_of_statistics = options.curvature, options.statistics
    if options.history is not None:
        named = {"curvature": path_of_curvature, "statistics": path_of_statistics}
        beside = beside_history([kind for kind in KINDS if named[kind] is None], options.history, options.checkpoint)
        path_of_curvature = path_of_curvature or beside.get("curvature")
        path_of_statistics = path_of_statistics or beside.get("statistics")
    curvature = None if path_of_curvature is None else Curvature.load(path_of_curvature)
    statistics = None if path_of_statistics is None else ExpertStatistics.load(path_of_statistics)
    data = data_of(options, options.checkpoint)
    calibration = _calibration(options, data)
    model = load_model(options.checkpoint, dtype="float32")
    seq2seq = model.config.is_encoder_decoder
    found = compare(
        model,
        islice(data.val_dataloader(), options.max_batches),
        data.token_counts,
        history,
        curvature=curvature,
        statistics=statistics,
        calibration=calibration,
        methods=options.methods,
        budgets=options.average_bits,
        bits=options.bits,
        group_size=options.group_size,
        granularities=options.granularity,
        random_draws=options.random_draws,
        task=_rouge_of(data, options.rouge_examples) if seq2seq and options.rouge_examples else None,
        task_name="ROUGE-L" if seq2seq and options.rouge_examples else "",
        end_of_text=None if seq2seq else data.tokenizer.eos_token_id,
        text=judged_on(data),
    )
    options.document = found.to_dict() | {"verdict": verdict(found)}
    show(comparison_table(found))
    if found.correlations:
        show(correlation_table(found))
    print("\n".join([*verdict(found), *(f"left out: {reason}" for reason in found.skipped)]))
    if options.output is not None:
        with replaced_when_done(options.output) as temporary:
            temporary.write_text(
                json.dumps(options.document, indent=2, allow_nan=False) + "\n",
                encoding="utf-8",
            )
    if options.plot is not None:
        with replaced_when_done(options.plot) as temporary:
            plot_comparison(found).savefig(temporary, format=Path(options.plot).suffix.lstrip("."), dpi=120)
    if options.write_plan is not None:
        winner = found.winner(options.average_bits[0])
        if winner is None:
            raise AllocationError("no method could be compared, so there is no winner to write")
        if curvature is not None:
            curvature.save(PlanFiles.of(options.write_plan).curvature)
        if statistics is not None:
            statistics.save(PlanFiles.of(options.write_plan).statistics)
        winner.plan.save(options.write_plan)
    for path in outputs:
        print(f"wrote {path}")


def _checked_outputs(options: argparse.Namespace) -> list[str]:
    """The files that will be written, after checking all that can be wrong with the command."""
    outputs: list[str] = [path for path in (options.output, options.plot, options.write_plan) if path is not None]
    if options.write_plan is not None:
        if len(options.average_bits) > 1:
            raise ValueError(f"--write-plan writes one plan: give one budget, got {options.average_bits}")
        if Path(options.write_plan).suffix != ".json":
            raise ValueError(f"--write-plan must end in .json, got {options.write_plan!r}")
        if all(METHODS[method].control for method in options.methods):
            raise ValueError(f"--write-plan writes the winner, but {', '.join(options.methods)} are controls")
    if options.plot is not None and Path(options.plot).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, got {options.plot!r}")
    beside = None if options.write_plan is None else PlanFiles.of(options.write_plan)
    beside_plan = [] if beside is None else [str(beside.curvature), str(beside.statistics)]
    for path in [*outputs, *beside_plan]:
        if Path(path).exists():
            raise FileExistsError(f"{path!r} exists; name another file")
        check_writable(path)
    for budget in options.average_bits:
        check_levels(budget, options.bits)
    return outputs


def _calibration(options: argparse.Namespace, data: Any) -> list[Any]:
    """Training batches, never those that plans are judged on."""
    if not options.calibration_batches:
        return []
    if options.heldout is not None and options.dataset is None:
        raise ValueError(
            "the sensitivity is measured on training text, and --heldout alone names none: give --dataset too, or "
            "--calibration-batches 0"
        )
    return list(islice(data.train_dataloader(), options.calibration_batches))


def _rouge_of(data: Any, examples: int) -> Callable[[Any], float]:
    """ROUGE-L of a model's summaries of the first validation documents."""
    from torchmetrics.text.rouge import ROUGEScore

    from moe_precision.recipes.seq2seq_lm import add_summaries

    def rouge(model: Any) -> float:
        score, left = ROUGEScore(rouge_keys="rougeL"), examples
        for batch in data.val_dataloader():
            if left <= 0:
                break
            add_summaries(score, model, {key: value[:left] for key, value in batch.items()}, data.tokenizer)
            left -= len(batch["labels"])
        return float(score.compute()["rougeL_fmeasure"])

    return rouge


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "compare",
        run,
        "moe-precision compare runs/demo/checkpoint runs/demo/precision_plan.history.safetensors --group-size 64 "
        "--max-batches 8 --write-plan best.json",
    )
    command.add_argument(
        "checkpoint", help="folder of the trained float checkpoint, with its tokenizer unless --tokenizer is given"
    )
    command.add_argument("history", nargs="?", help="x.history.safetensors of its training; without it, final norms")
    command.add_argument(
        "--curvature", metavar="FILE", help="x.curvature.safetensors (default: the one beside the history, if any)"
    )
    command.add_argument(
        "--statistics", metavar="FILE", help="x.statistics.safetensors (default: the one beside the history, if any)"
    )
    command.add_argument(
        "--methods", nargs="+", default=list(ALL_METHODS), choices=list(ALL_METHODS), help="default: all of them"
    )
    command.add_argument("--average-bits", type=float, nargs="+", default=[2.5], help="budgets (default 2.5)")
    add_levels(command)
    command.add_argument(
        "--granularity",
        nargs="+",
        default=["expert", "expert+projection"],
        choices=list(GRANULARITIES),
        help="what shares a width, for the methods that know costs (default: expert and expert+projection)",
    )
    command.add_argument(
        "--random-draws", type=positive, default=40, help="39 or more can show a difference at 5 %% (default 40)"
    )
    command.add_argument("--max-batches", type=positive, help="validation batches of 16 rows (default: all)")
    command.add_argument(
        "--calibration-batches",
        type=count,
        default=4,
        help="training batches on which costs are calibrated, and the sensitivity of every expert matrix at each level "
        "is measured, which is slow (default 4; 0 leaves both out)",
    )
    command.add_argument(
        "--rouge-examples", type=count, default=32, help="documents to summarize, sequence-to-sequence (default 32)"
    )
    add_heldout(command)
    add_dataset(command)
    command.add_argument("-o", "--output", metavar="FILE", help="write all numbers as JSON")
    command.add_argument("--plot", metavar="PNG", help="plot them")
    command.add_argument(
        "--write-plan", metavar="PLAN", help="write the winner's plan (and curvature and statistics beside it)"
    )
    add_output(command)
