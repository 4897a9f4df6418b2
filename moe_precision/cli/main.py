"""The command line: ``moe-precision fit | plan | show | compare | quantize | export | evaluate | demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..allocation.allocator import (
    ALL_METHODS,
    GRANULARITIES,
    PLAN_METHODS,
    AllocationError,
    allocate,
    check_granularity,
    levels_of,
)
from ..allocation.orders import check_levels
from ..checkpoints.checkpoint import Checkpoint, load_model
from ..checkpoints.sources import StreamingError
from ..export import ENGINES, TARGETS, export, plan_of_checkpoint
from ..files import check_writable, replaced_when_done
from ..layers.moe_layers import find_moe_layers
from ..plans.plan import PrecisionPlan, check_group_size
from ..present import tables
from ..quantize.writer import quantize_checkpoint
from ..recording.curvature import Curvature, curvature_of_losses, curvature_path
from ..recording.router_norms import RouterNormHistory
from ..version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. User errors print one line and return 2; `fit` raises them."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["fit"] and arguments[1:] not in ([], ["-h"], ["--help"]):
        fit(arguments[1:])
        return 0
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"moe-precision {options.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def fit(arguments: Sequence[str]) -> Any:
    """Trains a recipe: ``LightningCLI fit`` with these arguments; returns the data module that it trained on."""
    import warnings

    from .fit_cli import FitCLI

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    return FitCLI(args=["fit", *arguments], save_config_kwargs={"overwrite": True}).datamodule


def _plan(options: argparse.Namespace) -> None:
    if Path(options.output).exists():
        raise FileExistsError(f"{options.output!r} exists; name another file with -o")
    check_writable(options.output)
    if options.curvature_batches is not None and curvature_path(options.output).exists():
        raise FileExistsError(f"{str(curvature_path(options.output))!r} exists; name another file with -o")
    plan, curvature = _allocated(options)
    if curvature is not None:
        curvature.save(curvature_path(options.output))
        print(f"wrote {curvature_path(options.output)}")
    plan.save(options.output)
    tables.show(tables.plan_table(plan))
    print(f"wrote {options.output}")


def _allocated(options: argparse.Namespace) -> tuple[PrecisionPlan, Curvature | None]:
    """The plan of what the command names, a history, one checkpoint, or two, and curvature that was made for it."""
    source, initial, final = options.source, options.initial, options.final
    if source is None and final is None:
        raise ValueError("give a history, a checkpoint folder, or --final with --initial; see --help")
    if source is not None and initial is not None:
        raise ValueError("--initial takes the place of the history; give one of them")
    if source is not None and Path(source).is_dir():
        if final is not None:
            raise ValueError(f"{source!r} is a checkpoint folder: give it with --initial to measure from it to --final")
        source, final = None, source
    for folder in (initial, final):
        if folder is not None:
            Checkpoint(folder)  # before any work
    settings = {key: getattr(options, key) for key in ("method", "average_bits", "bits", "group_size", "seed")}
    settings |= {"router_pattern": options.router_pattern, "expert_pattern": options.expert_pattern}
    settings |= {key: getattr(options, key) for key in ("curvature", "granularity", "stored_bits", "expert_gib")}
    if options.method == "curvature" and options.curvature_batches is None and options.curvature is None:
        settings["curvature"] = _beside(source)
    made = None
    if options.curvature_batches is not None:
        if final is None:
            raise ValueError("--curvature-batches takes gradients of the trained model: give its checkpoint")
        made = settings["curvature"] = _curvature_by_batches(options, final, source)
    history = source if source is not None else initial
    try:
        return allocate(final, history, **settings), made
    except StreamingError as error:
        if initial is not None:
            raise
        print(f"{error}: loading the whole model instead", file=sys.stderr)
        return allocate(load_model(final), history, **settings), made


def _beside(path: str | None) -> Path | None:
    """The curvature that a run has written beside a plan or a history, if it is there."""
    if path is None:
        return None
    curvature = curvature_path(path.removesuffix(".json").removesuffix(".history.safetensors") + ".json")
    return curvature if curvature.is_file() else None


def _curvature_by_batches(options: argparse.Namespace, checkpoint: str, history: str | None) -> Curvature:
    """Squared gradients of a checkpoint on training batches, after all that can be wrong with the plan is checked."""
    if options.curvature is not None:
        raise ValueError("--curvature and --curvature-batches are two sources of one thing; give one")
    in_bytes = options.stored_bits is not None or options.expert_gib is not None
    levels_of(options.method, max(options.bits) if in_bytes else options.average_bits, options.bits)
    check_granularity(options.method, options.granularity)
    patterns = {} if history is None else RouterNormHistory.load(history).patterns
    for key in ("router_pattern", "expert_pattern"):
        if getattr(options, key) is not None:
            patterns[key] = getattr(options, key)
    model = load_model(checkpoint, dtype="float32")
    layers = find_moe_layers(model.train(), **patterns)
    for layer in layers:
        check_group_size(options.group_size, layer.name, layer.projections)
    data = _data(options, checkpoint, model)
    batches = islice(data.train_dataloader(), options.curvature_batches)
    bar = tqdm(batches, desc="gradients", total=options.curvature_batches, unit="batch", disable=None)
    losses = (partial(lambda batch: model(**batch).loss, batch) for batch in bar)
    return curvature_of_losses(layers, losses)


def _data(options: argparse.Namespace, checkpoint: str, model: Any) -> Any:
    """The data module that goes with a checkpoint's model, set up with its tokenizer."""
    from ..recipes import SummarizationDataModule, TextDataModule

    module = SummarizationDataModule if model.config.is_encoder_decoder else TextDataModule
    data = module(dataset=options.dataset, dataset_config=options.dataset_config, tokenizer=checkpoint)
    data.setup("validate")
    return data


def _show(options: argparse.Namespace) -> None:
    plan = _plan_of(options.plan)
    if options.diff:
        lines = plan.diff(_plan_of(options.diff))
        print("\n".join(lines) or "the plans give every expert the same bits")
        return
    tables.show(tables.plan_table(plan))
    if Path(options.plan).is_dir():
        stored = Checkpoint(options.plan).stored_bits_per_expert_weight(plan)
        print(f"its files hold {stored:.4g} bits an expert weight, scales and offsets included")


def _plan_of(source: str) -> PrecisionPlan:
    """A plan's file, or the widths that a quantized checkpoint has."""
    return plan_of_checkpoint(source) if Path(source).is_dir() else PrecisionPlan.load(source)


def _export(options: argparse.Namespace) -> None:
    if options.output is not None:
        if Path(options.output).exists():
            raise FileExistsError(f"{options.output!r} exists; name another file with -o")
        check_writable(options.output)
    if Path(options.plan).is_dir():
        raise ValueError(f"{options.plan!r} is a folder; give a plan's JSON file")
    found = export(options.plan, options.to, options.engine)
    print("\n".join(f"note: {note}" for note in found.notes), file=sys.stderr)
    if options.output is None:
        print(found.text, end="")
        return
    with replaced_when_done(options.output) as temporary:
        temporary.write_text(found.text, encoding="utf-8")
    print(f"wrote {options.output}")


def _compare(options: argparse.Namespace) -> None:
    from ..judging.comparison import CONTROLS, compare, verdict
    from ..present.figures import plot_comparison

    outputs = [path for path in (options.output, options.plot, options.write_plan) if path is not None]
    if options.write_plan is not None:
        if len(options.average_bits) > 1:
            raise ValueError(f"--write-plan writes one plan: give one budget, got {options.average_bits}")
        if Path(options.write_plan).suffix != ".json":
            raise ValueError(f"--write-plan must end in .json, got {options.write_plan!r}")
        if all(method in CONTROLS for method in options.methods):
            raise ValueError(f"--write-plan writes the winner, and {', '.join(options.methods)} are controls")
    if options.plot is not None and Path(options.plot).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, got {options.plot!r}")
    for path in [*outputs, *([curvature_path(options.write_plan)] if options.write_plan is not None else [])]:
        if Path(path).exists():
            raise FileExistsError(f"{str(path)!r} exists; name another file")
        check_writable(path)
    for budget in options.average_bits:
        check_levels(budget, options.bits)
    history = None if options.history is None else RouterNormHistory.load(options.history)
    path_of_curvature = options.curvature or _beside(options.history)
    curvature = None if path_of_curvature is None else Curvature.load(path_of_curvature)
    model = load_model(options.checkpoint, dtype="float32")
    data = _data(options, options.checkpoint, model)
    seq2seq = model.config.is_encoder_decoder
    found = compare(
        model,
        islice(data.val_dataloader(), options.max_batches),
        data.token_counts,
        history,
        curvature,
        list(islice(data.train_dataloader(), options.calibration_batches)),
        methods=options.methods,
        budgets=options.average_bits,
        bits=options.bits,
        group_size=options.group_size,
        granularities=options.granularity,
        random_draws=options.random_draws,
        task=_rouge_of(data, options.rouge_examples) if seq2seq and options.rouge_examples else None,
        task_name="ROUGE-L" if seq2seq and options.rouge_examples else "",
        end_of_text=None if seq2seq else data.tokenizer.eos_token_id,
    )
    tables.show(tables.comparison_table(found))
    if found.correlations:
        tables.show(tables.correlation_table(found))
    print("\n".join([*verdict(found), *(f"left out: {reason}" for reason in found.skipped)]))
    if options.output is not None:
        with replaced_when_done(options.output) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot is not None:
        with replaced_when_done(options.plot) as temporary:
            plot_comparison(found).savefig(temporary, format=Path(options.plot).suffix.lstrip("."), dpi=120)
    if options.write_plan is not None:
        winner = found.winner(options.average_bits[0])
        if winner is None:
            raise AllocationError("no method could be compared, there is no winner to write")
        if curvature is not None:
            curvature.save(curvature_path(options.write_plan))
        winner.plan.save(options.write_plan)
    for path in outputs:
        print(f"wrote {path}")


def _rouge_of(data: Any, examples: int) -> Callable[[Any], float]:
    """ROUGE-L of a model's summaries of the first validation documents."""
    from torchmetrics.text.rouge import ROUGEScore

    from ..recipes.seq2seq_lm import add_summaries

    def rouge(model: Any) -> float:
        score, left = ROUGEScore(rouge_keys="rougeL"), examples
        for batch in data.val_dataloader():
            if left <= 0:
                break
            add_summaries(score, model, {key: value[:left] for key, value in batch.items()}, data.tokenizer)
            left -= len(batch["labels"])
        return float(score.compute()["rougeL_fmeasure"])

    return rouge


def _quantize(options: argparse.Namespace) -> None:
    plan = PrecisionPlan.load(options.plan)
    check_writable(Path(options.out).parent / "config.json")
    if options.backend == "auto-round":
        _quantize_with_auto_round(options, plan)
        return
    curvature = options.curvature or _beside(options.plan)
    annealed = Path(options.plan).with_suffix(".grid.safetensors")
    grid = options.grid or (annealed if annealed.is_file() else None)
    if grid is not None:
        print(f"takes scales and offsets from {grid}, on which training has ended")
    elif curvature is not None:
        print(f"weighs the fit by {curvature}")
    else:
        print("no curvature file: errors of all columns count alike")
    fit = options.non_expert_bits, curvature, grid
    quantize_checkpoint(options.checkpoint, plan, options.out, *fit, options.workers, options.max_shard_size)
    before, after = Checkpoint(options.checkpoint), Checkpoint(options.out)
    sizes = f"{before.nbytes / 1e6:.2f} MB -> {after.nbytes / 1e6:.2f} MB"
    bits = after.stored_bits_per_expert_weight(plan)
    print(f"wrote {options.out}: {sizes}, {bits:.3f} stored bits per expert weight")


def _quantize_with_auto_round(options: argparse.Namespace, plan: PrecisionPlan) -> None:
    from ..export.auto_round_backend import quantize_with_auto_round

    ours = {"--curvature": options.curvature, "--grid": options.grid, "--non-expert-bits": options.non_expert_bits}
    given = [name for name, value in ours.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not with --backend auto-round, which fits the weights itself")
    blocks: list[Any] = []
    if options.iterations:
        model = Checkpoint(options.checkpoint).meta_model()
        batches = _data(options, options.checkpoint, model).train_dataloader()
        whole = (row for batch in batches for row in batch["input_ids"][(batch["labels"] != -100).all(dim=1)])
        blocks = list(islice(whole, options.samples))
    for note in quantize_with_auto_round(options.checkpoint, plan, options.out, blocks, options.iterations):
        print(note, file=sys.stderr)
    print(f"wrote {options.out} in AutoRound's format; load it in a process that loads no float model afterwards")


def _evaluate(options: argparse.Namespace) -> None:
    from ..judging.evaluation import evaluate

    model = load_model(options.checkpoint, **({} if options.dtype == "auto" else {"dtype": options.dtype}))
    data = _data(options, options.checkpoint, model)
    batches = data.val_dataloader()
    result = evaluate(model, list(islice(batches, options.max_batches)), data.token_counts)
    tables.show(tables.evaluation_table({Path(options.checkpoint).name: result}))


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(Path(options.output), options.max_steps)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-precision",
        description="Mixed-precision plans for Mixture-of-Experts models, read off training itself.",
        epilog="moe-precision COMMAND --help explains a command by an example.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: object, summary: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    def add_dataset(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--dataset",
            default="python-stdlib",
            help="a `datasets` name, local text files, or python-stdlib (default): the standard library's source",
        )
        command.add_argument("--dataset-config", help="the configuration's name, for a `datasets` name")

    add(
        "fit",
        lambda options: commands.choices["fit"].print_help(),
        "Train a recipe with the callback, by LightningCLI: any key of the YAML is an option, --print_config prints "
        "the whole configuration, and --trainer.callbacks.help RouterNormMonitor explains the callback.",
        "moe-precision fit --config recipes/pretrain_mixtral.yaml --trainer.max_steps 200",
    )

    plan = add(
        "plan",
        _plan,
        "Make a plan without training: with other bits from the norms that a run recorded, or from two checkpoints, "
        "before and after a fine-tuning that nobody watched. Checkpoints are read tensor by tensor.",
        "moe-precision plan runs/demo/precision_plan.history.safetensors --average-bits 2.25 --bits 2 3 "
        "--group-size 64 -o plan_2.25.json\n"
        "  moe-precision plan --initial base-model --final finetuned-model -o plan.json",
    )
    plan.add_argument(
        "source",
        nargs="?",
        help="the history beside a plan (x.history.safetensors), or a checkpoint folder: without a history, experts "
        "are ranked by their final norms and the plan says so",
    )
    plan.add_argument("--initial", metavar="FOLDER", help="the checkpoint that training started from")
    plan.add_argument(
        "--final", metavar="FOLDER", help="the trained checkpoint; with a history, its last norms and variances"
    )
    plan.add_argument("--router-pattern", metavar="REGEX", help="names the routers' weights; see find_moe_layers")
    plan.add_argument("--expert-pattern", metavar="REGEX", help="names the experts' weights; see find_moe_layers")
    plan.add_argument("--average-bits", type=float, default=2.5, help="bits an expert on average (default 2.5)")
    plan.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="levels to choose from (default 2 3)")
    plan.add_argument("--method", default="router_norm", choices=list(PLAN_METHODS), help="how widths are chosen")
    plan.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    plan.add_argument(
        "--curvature",
        metavar="FILE",
        help="x.curvature.safetensors, for --method curvature (default: the one beside the history, if there)",
    )
    plan.add_argument(
        "--granularity",
        default="expert",
        choices=list(GRANULARITIES),
        help="what shares a width (default expert; the others for --method curvature and weight_error)",
    )
    plan.add_argument(
        "--stored-bits", type=float, help="budget with scales and offsets, in the place of --average-bits"
    )
    plan.add_argument("--expert-gib", type=float, help="the same as the size of all routed experts, in GiB")
    plan.add_argument(
        "--curvature-batches",
        type=_positive,
        metavar="N",
        help="take the curvature from squared gradients of the checkpoint on N training batches, where the optimizer "
        "kept none; written beside the plan",
    )
    add_dataset(plan)
    plan.add_argument("--seed", type=int, default=0, help="for --method random")
    plan.add_argument("-o", "--output", default="precision_plan.json", help="default precision_plan.json")

    show = add(
        "show",
        _show,
        "Print the bits of every expert as a table, of a plan or of a checkpoint that AutoRound, GPTQModel, "
        "llm-compressor or moe-precision quantized, or where two of them differ.",
        "moe-precision show runs/demo/precision_plan.json --diff plan_2.25.json\n"
        "  moe-precision show runs/demo/quantized-plan",
    )
    show.add_argument("plan", help="a plan's JSON file, or the folder of a quantized checkpoint")
    show.add_argument("--diff", metavar="OTHER", help="another of either: print the experts whose bits differ")

    compare = add(
        "compare",
        _compare,
        "Judge every method on your own model: each at each budget, at equal stored bits, by the loss on held-out "
        "text, with intervals, random draws and the tail; says in plain words which plan to use, and can write it.",
        "moe-precision compare runs/demo/checkpoint runs/demo/precision_plan.history.safetensors --group-size 64 "
        "--max-batches 8 --write-plan best.json",
    )
    compare.add_argument("checkpoint", help="folder of the trained float checkpoint, with its tokenizer")
    compare.add_argument("history", nargs="?", help="x.history.safetensors of its training; without it, final norms")
    compare.add_argument(
        "--curvature", metavar="FILE", help="x.curvature.safetensors (default: the one beside the history, if there)"
    )
    compare.add_argument(
        "--methods", nargs="+", default=list(ALL_METHODS), choices=list(ALL_METHODS), help="default: all of them"
    )
    compare.add_argument("--average-bits", type=float, nargs="+", default=[2.5], help="budgets (default 2.5)")
    compare.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="levels to choose from (default 2 3)")
    compare.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    compare.add_argument(
        "--granularity",
        nargs="+",
        default=["expert", "expert+projection"],
        choices=list(GRANULARITIES),
        help="of the methods that know costs (default: expert and expert+projection)",
    )
    compare.add_argument(
        "--random-draws", type=_positive, default=40, help="39 can show a difference at 5 %% (default 40)"
    )
    compare.add_argument("--max-batches", type=_positive, help="validation batches of 16 rows (default: all)")
    compare.add_argument(
        "--calibration-batches",
        type=_count,
        default=4,
        help="training batches on which the sensitivity of every expert matrix at every level is measured, which is "
        "slow (default 4; 0 leaves it out)",
    )
    compare.add_argument(
        "--rouge-examples", type=_count, default=32, help="documents to summarize, sequence-to-sequence (default 32)"
    )
    add_dataset(compare)
    compare.add_argument("-o", "--output", metavar="JSON", help="write all figures")
    compare.add_argument("--plot", metavar="PNG", help="draw them")
    compare.add_argument("--write-plan", metavar="PLAN", help="write the winner's plan (and curvature beside it)")

    quantize = add(
        "quantize",
        _quantize,
        "Quantize a float checkpoint by a plan, a shard at a time, so that the model may be larger than memory; OUT "
        "loads with from_pretrained after `import moe_precision`. An interrupted run goes on when it is started again.",
        "moe-precision quantize runs/demo/checkpoint runs/demo/precision_plan.json runs/demo/quantized",
    )
    quantize.add_argument("checkpoint", help="folder of a float checkpoint, as save_pretrained writes it")
    quantize.add_argument("plan", help="a plan's JSON file")
    quantize.add_argument("out", help="folder to write")
    quantize.add_argument(
        "--non-expert-bits", type=int, choices=[4, 8], help="quantize the other linear layers too (default: leave them)"
    )

    quantize.add_argument(
        "--curvature",
        metavar="FILE",
        help="weighs the fit (default: x.curvature.safetensors beside the plan, if there)",
    )
    quantize.add_argument(
        "--grid", metavar="FILE", help="of PrecisionAnneal (default: x.grid.safetensors beside the plan, if there)"
    )
    quantize.add_argument(
        "--workers",
        type=_positive,
        default=1,
        help="processes that pack layers side by side; each holds one (default 1)",
    )
    quantize.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="250MB",
        help="of a packed file; memory holds one, and a larger layer has its own (default 250MB)",
    )

    quantize.add_argument(
        "--backend",
        choices=["moe-precision", "auto-round"],
        default="moe-precision",
        help="auto-round: AutoRound tunes the rounding on text and writes its own format (needs the whole float model "
        "in memory, and `pip install moe-precision[auto-round]`); the options below are for it",
    )
    quantize.add_argument(
        "--iterations",
        type=int,
        default=200,
        help="of AutoRound's tuning, a decoder layer; 0 rounds to the nearest, without text (default 200)",
    )
    quantize.add_argument(
        "--samples", type=_positive, default=128, help="blocks of 256 training tokens to tune on (default 128)"
    )
    add_dataset(quantize)

    as_config = add(
        "export",
        _export,
        "Print a plan as the config of another quantizer (docs/export.md says how each takes it). Widths that it does "
        "not have are rounded up, with a note; a plan that it cannot carry out is an error.",
        "moe-precision export runs/demo/precision_plan.json --to autoround > layer_config.json",
    )
    as_config.add_argument("plan", help="a plan's JSON file")
    as_config.add_argument("--to", required=True, choices=list(TARGETS), help="whose config")
    as_config.add_argument(
        "--engine",
        choices=list(ENGINES),
        help="the checkpoint is for this inference engine, which wants one format a layer (of autoround, gptqmodel and "
        "llm-compressor)",
    )
    as_config.add_argument("-o", "--output", metavar="FILE", help="write to a file (default: print)")

    evaluate = add(
        "evaluate",
        _evaluate,
        "Loss and perplexity of a float or packed checkpoint, mean and on the rarest tenth of target tokens, in blocks "
        "of 256 tokens (the demo's are of 128, so its figures differ).",
        "moe-precision evaluate runs/demo/quantized-plan --max-batches 20",
    )
    evaluate.add_argument("checkpoint", help="checkpoint folder that holds its tokenizer")
    add_dataset(evaluate)
    evaluate.add_argument("--max-batches", type=_positive, help="use at most this many validation batches of 16")
    evaluate.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32 or bfloat16")

    demo = add(
        "demo",
        _demo,
        "Train a small Mixtral, make its plan, quantize, reload and compare; minutes on two CPU cores.",
        "moe-precision demo --output runs/demo",
    )
    demo.add_argument("--output", default="runs/demo", help="folder of the run (default runs/demo)")
    demo.add_argument("--max-steps", type=_positive, help="optimizer steps (default: the recipe's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
