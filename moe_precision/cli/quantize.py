"""``moe-precision quantize``: a float checkpoint and a plan in, a packed checkpoint out."""

from __future__ import annotations

import argparse
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, load_model
from ..checkpoints.folders import check_quantizing, kept_folder
from ..files import check_writable
from ..layers.moe_layers import find_moe_layers
from ..plans.beside import existing
from ..plans.plan import PrecisionPlan
from ..quantize.codec.grid import Grid
from ..quantize.replace import check_packable, non_expert_linears
from ..quantize.sizes import ModelSizes
from ..quantize.writer import distill_checkpoint, distill_streamed, quantize_checkpoint
from ..recording.collecting import MEMORY_GIB, bytes_of, collect_statistics, linear_widths, passes
from ..recording.statistics import ExpertStatistics, file_bytes
from .auto_round import quantize_with_auto_round
from .estimate import print_sizes
from .options import Commands, add_command, add_dataset, add_output, data_of, dataset_name, positive
from .ranks import by_ranks


def run(options: argparse.Namespace) -> None:
    """Quantizes the checkpoint and prints the result."""
    plan = PrecisionPlan.load(options.plan)
    check_writable(Path(options.out).parent / "config.json")
    _check_statistics(options)
    if options.backend == "auto-round":
        if options.dry_run:
            raise ValueError("--dry-run tells what our own format takes; --backend auto-round writes another")
        quantize_with_auto_round(options)
        return
    curvature = options.curvature or existing("curvature", options.plan)
    grid = _grid(options)
    given = options.statistics or existing("statistics", options.plan)
    named = None if given == "none" else given
    with Checkpoint(options.checkpoint) as source:  # all that is read, before any work
        check_quantizing(source, options.out, options.plan, curvature, grid, named)
        if options.dry_run:
            model = source.meta_model()
            of_model = ModelSizes(model, plan.patterns, plan.group_size, options.non_expert_bits)
            check_packable(model, of_model.layers)
            options.document = print_sizes(of_model, plan=plan, statistics_memory=options.statistics_memory)
            return
    statistics = _statistics(options, plan, grid, named)
    if grid is not None:
        distilled = bool(Grid.load(grid).codes)
        what = "codes and distilled scales" if distilled else "scales and offsets"
        print(f"takes {what} from {grid}, which {'a run has left' if distilled else 'training ended on'}")
    elif curvature is not None:
        print(f"weights the fit by {curvature}")
    else:
        print("no curvature file: errors in all columns count equally")
    how = {key: getattr(options, key) for key in ("non_expert_bits", "workers", "max_shard_size")}
    known: dict[str, Any] = {"curvature": curvature, "statistics": statistics}
    try:
        if options.distill_steps:
            _distill(options, plan, known, how)
        else:
            quantize_checkpoint(options.checkpoint, plan, options.out, grid=grid, ranks=options.ranks, **known, **how)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(Path(options.out))) from None
    if not options.ranks.first:  # which may not see OUT yet
        return
    after = Checkpoint(options.out)
    sizes = f"{source.nbytes / 1e6:.2f} MB -> {after.nbytes / 1e6:.2f} MB"
    bits = after.stored_bits_per_expert_weight(plan)
    options.document = {
        "out": options.out,
        "bytes_before": source.nbytes,
        "bytes_after": after.nbytes,
        "stored_bits": bits,
        "curvature": None if curvature is None else str(curvature),
        "grid": None if grid is None else str(grid),
        "distill_steps": options.distill_steps,
    }
    print(f"wrote {options.out}: {sizes}, {bits:.3f} stored bits per expert weight")


def _kept(out: Path) -> str:
    """What an interruption leaves, in words."""
    if (folder := kept_folder(out)) is None:
        return "nothing was packed yet"
    count = len(list(folder.glob("model*.safetensors")))
    return f"{count} packed files are kept in {str(folder)!r}, and the same command goes on from them"


def _check_statistics(options: argparse.Namespace) -> None:
    """Raises `ValueError` for options that do not go together, and `OSError` if the file could not be written."""
    if options.statistics is not None and options.statistics_batches is not None:
        raise ValueError("--statistics and --statistics-batches are two sources of one thing; give one")
    if options.distill_steps is not None and (grid := _grid(options)) is not None:
        raise ValueError(
            f"--distill-steps would change the scales of {str(grid)!r}, which a run has ended on or distilled; leave "
            "it out, or the grid (--grid none)"
        )
    if options.save_statistics is not None:
        if options.statistics_batches is None:
            raise ValueError("--save-statistics keeps what --statistics-batches collects; give that too")
        check_writable(options.save_statistics)


def _grid(options: argparse.Namespace) -> str | Path | None:
    """The grid that is named, or stands beside the plan."""
    given = options.grid or existing("grid", options.plan)
    return None if given == "none" else given


def _statistics(
    options: argparse.Namespace, plan: PrecisionPlan, grid: str | Path | None, given: str | Path | None
) -> ExpertStatistics | str | Path | None:
    """Of the file that is named or stands beside the plan, or collected now; a grid leaves nothing to round."""
    if grid is not None:
        if given is not None or options.statistics_batches is not None:
            print("statistics are not used: codes and scales are those of the grid")
        return None
    if options.statistics_batches is not None:
        return _collected(options, plan)
    if given is None:
        return None
    statistics = ExpertStatistics.load(given, check_moments=False)  # `quantize_checkpoint` does
    print(f"rounds under the statistics of {given} (from {statistics.text or 'text that it does not name'})")
    print(statistics.described())
    return given


def _collected(options: argparse.Namespace, plan: PrecisionPlan) -> ExpertStatistics:
    """Runs the float checkpoint on training batches."""
    data = data_of(options, options.checkpoint)
    model = load_model(options.checkpoint, dtype="float32")
    layers = find_moe_layers(model, **plan.patterns)
    plan.check(model)
    memory = options.statistics_memory
    widths = {} if options.non_expert_bits is None else linear_widths(model, non_expert_linears(model, layers))
    groups = passes(layers, memory, widths)
    peak, file = max(map(bytes_of, groups)), file_bytes(layers, widths.values())
    several = f", in {len(groups)} passes over the text" if len(groups) > 1 else ""
    text = f"{options.statistics_batches} training batches of {dataset_name(options)}"
    print(
        f"collects statistics from {text}: {peak / 1e6:,.1f} MB beside the float model, {file / 1e6:,.1f} MB "
        f"afterwards{several}"
    )
    batches = list(islice(data.train_dataloader(), options.statistics_batches))
    statistics = collect_statistics(model, batches, text=text, memory_gib=memory, linears=list(widths), **plan.patterns)
    print(statistics.described())
    if options.save_statistics is not None:
        statistics.save(options.save_statistics)
    return statistics


def _distill(options: argparse.Namespace, plan: PrecisionPlan, known: dict[str, Any], how: dict[str, Any]) -> None:
    """Quantizes, and trains the scales on training batches; ``known`` and ``how`` go to `quantize_checkpoint`."""
    batches = data_of(options, options.checkpoint).train_dataloader()  # found before hours of packing, not after
    source, out, steps = options.checkpoint, Path(options.out), options.distill_steps
    if options.distill_through == "layers":
        grid, found = distill_streamed(source, plan, batches, steps=steps, **known)
        quantize_checkpoint(source, plan, out, grid=grid, statistics=known["statistics"], **how)
    else:
        undistilled, shards = out.with_name(f".{out.name}.undistilled"), how["max_shard_size"]
        quantize_checkpoint(source, plan, undistilled, **known, **how)
        try:
            found = distill_checkpoint(
                source, undistilled, out, batches, steps=steps, through="logits", max_shard_size=shards
            )
        finally:
            shutil.rmtree(undistilled)
    print(f"distilled scales over {steps} training batches of {dataset_name(options)}")
    print(found.described())


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "quantize",
        by_ranks(run),
        "moe-precision quantize runs/demo/checkpoint runs/demo/precision_plan.json runs/demo/quantized",
    )
    command.add_argument("checkpoint", help="folder of a float checkpoint, as save_pretrained writes it")
    command.add_argument("plan", help="a plan's JSON file")
    command.add_argument("out", help="folder to write")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="check what can be checked without reading weights, print what `moe-precision estimate` prints, and stop",
    )
    command.add_argument(
        "--non-expert-bits", type=int, choices=[4, 8], help="quantize the other linear layers too (default: leave them)"
    )
    command.add_argument(
        "--curvature",
        metavar="FILE",
        help="weights the fit (default: x.curvature.safetensors beside the plan, if any)",
    )
    command.add_argument(
        "--grid",
        metavar="FILE",
        help="PrecisionAnneal's grid, or the codes and scales that a run has distilled (default: x.grid.safetensors "
        "beside the plan, if there; none: leave them out)",
    )
    command.add_argument(
        "--statistics",
        metavar="FILE",
        help="second moments of the experts' inputs, which the fit rounds under (default: x.statistics.safetensors "
        "beside the plan, if there; none: leave them out)",
    )
    command.add_argument(
        "--statistics-batches",
        type=positive,
        metavar="N",
        help="collect them from N training batches of --dataset first; takes the whole float model in memory",
    )
    command.add_argument(
        "--statistics-memory",
        type=float,
        default=MEMORY_GIB,
        metavar="GIB",
        help="memory for the layers whose statistics are collected together; if all take more, the text is gone "
        f"through several times (default {MEMORY_GIB:g})",
    )
    command.add_argument("--save-statistics", metavar="FILE", help="keep what --statistics-batches collects")
    command.add_argument(
        "--distill-steps",
        type=positive,
        metavar="N",
        help="train scales and offsets, codes kept, on N training batches of --dataset, towards the float model "
        "(100 to 300 do most of it); one layer in memory at a time",
    )
    command.add_argument(
        "--distill-through",
        choices=["layers", "logits"],
        default="layers",
        help="towards the output of each layer of experts (default), or towards the predictions, which takes both "
        "models in memory and a backward pass through the whole model",
    )
    command.add_argument(
        "--workers",
        type=positive,
        default=1,
        help="processes that pack layers side by side; each holds one layer (default 1)",
    )
    command.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="250MB",
        help="size of a packed file; memory holds one, and a larger layer gets its own (default 250MB)",
    )
    command.add_argument(
        "--backend",
        choices=["moe-precision", "auto-round"],
        default="moe-precision",
        help="auto-round: AutoRound tunes the rounding on text and writes its own format (needs the whole float model "
        "in memory, and `pip install moe-precision[auto-round]`); the options below are for it",
    )
    command.add_argument(
        "--iterations",
        type=int,
        default=200,
        help="steps of AutoRound's tuning per decoder layer; 0 rounds to the nearest, without text (default 200)",
    )
    command.add_argument(
        "--samples", type=positive, default=128, help="blocks of 256 training tokens to tune on (default 128)"
    )
    add_dataset(command)
    add_output(command)
