"""The command line: ``moe-precision fit | plan | show | quantize | evaluate | demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from . import tables
from .allocation import ALL_METHODS, GRANULARITIES, allocate
from .checkpoint_signals import StreamingError
from .checkpoints import load_model, quantize_checkpoint, stored_bits_per_expert_weight, tensor_bytes, weight_files
from .files import check_writable
from .plan import PrecisionPlan
from .version import __version__


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

    from pytorch_lightning.cli import LightningCLI

    import moe_precision.callbacks  # noqa: F401  so that YAML may name the callbacks without their module

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    return LightningCLI(args=["fit", *arguments], save_config_kwargs={"overwrite": True}).datamodule


def _plan(options: argparse.Namespace) -> None:
    if Path(options.output).exists():
        raise FileExistsError(f"{options.output!r} exists; name another file with -o")
    check_writable(options.output)
    plan = _allocated(options)
    plan.save(options.output)
    tables.show(tables.plan_table(plan))
    print(f"wrote {options.output}")


def _allocated(options: argparse.Namespace) -> PrecisionPlan:
    """The plan of what the command names: a history, one checkpoint, or two."""
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
            weight_files(folder)  # before any work
    settings = {key: getattr(options, key) for key in ("method", "average_bits", "bits", "group_size", "seed")}
    settings |= {"router_pattern": options.router_pattern, "expert_pattern": options.expert_pattern}
    settings |= {key: getattr(options, key) for key in ("curvature", "granularity", "stored_bits")}
    history = source if source is not None else initial
    try:
        return allocate(final, history, **settings)
    except StreamingError as error:
        if initial is not None:
            raise
        print(f"{error}: loading the whole model instead", file=sys.stderr)
        return allocate(load_model(final), history, **settings)


def _show(options: argparse.Namespace) -> None:
    plan = PrecisionPlan.load(options.plan)
    if options.diff:
        lines = plan.diff(PrecisionPlan.load(options.diff))
        print("\n".join(lines) or "the plans give every expert the same bits")
        return
    tables.show(tables.plan_table(plan))


def _quantize(options: argparse.Namespace) -> None:
    plan = PrecisionPlan.load(options.plan)
    check_writable(Path(options.out).parent / "config.json")
    curvature = options.curvature
    beside = Path(options.plan).with_suffix(".curvature.safetensors")
    if curvature is None and beside.is_file():
        curvature = beside
    print(
        f"weighs the fit by {curvature}"
        if curvature is not None
        else "no curvature file: errors of all columns count alike"
    )
    quantize_checkpoint(options.checkpoint, plan, options.out, options.non_expert_bits, curvature)
    before, after = (sum(tensor_bytes(folder).values()) / 1e6 for folder in (options.checkpoint, options.out))
    bits = stored_bits_per_expert_weight(options.out, plan)
    print(f"wrote {options.out}: {before:.2f} MB -> {after:.2f} MB, {bits:.3f} stored bits per expert weight")


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation import evaluate
    from .recipes import SummarizationDataModule, TextDataModule

    model = load_model(options.checkpoint, **({} if options.dtype == "auto" else {"dtype": options.dtype}))
    module = SummarizationDataModule if model.config.is_encoder_decoder else TextDataModule
    data = module(dataset=options.dataset, dataset_config=options.dataset_config, tokenizer=options.checkpoint)
    data.setup("validate")
    assert data.token_counts is not None
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
    plan.add_argument("--method", default="router_norm", choices=list(ALL_METHODS), help="how widths are chosen")
    plan.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    plan.add_argument("--curvature", metavar="FILE", help="x.curvature.safetensors beside a plan, for that method")
    plan.add_argument(
        "--granularity",
        default="expert",
        choices=list(GRANULARITIES),
        help="what shares a width (default expert; the others for --method curvature and weight_error)",
    )
    plan.add_argument(
        "--stored-bits", type=float, help="budget with scales and offsets, in the place of --average-bits"
    )
    plan.add_argument("--seed", type=int, default=0, help="for --method random")
    plan.add_argument("-o", "--output", default="precision_plan.json", help="default precision_plan.json")

    show = add(
        "show",
        _show,
        "Print a plan as a table, or where two plans differ.",
        "moe-precision show runs/demo/precision_plan.json --diff plan_2.25.json",
    )
    show.add_argument("plan", help="a plan's JSON file")
    show.add_argument("--diff", metavar="OTHER", help="another plan: print the experts whose bits differ")

    quantize = add(
        "quantize",
        _quantize,
        "Quantize a float checkpoint by a plan; OUT loads with from_pretrained after `import moe_precision`.",
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

    evaluate = add(
        "evaluate",
        _evaluate,
        "Loss and perplexity of a float or packed checkpoint, mean and on the rarest tenth of target tokens, in blocks "
        "of 256 tokens (the demo's are of 128, so its figures differ).",
        "moe-precision evaluate runs/demo/quantized-plan --max-batches 20",
    )
    evaluate.add_argument("checkpoint", help="checkpoint folder that holds its tokenizer")
    evaluate.add_argument(
        "--dataset",
        default="python-stdlib",
        help="a `datasets` name, local text files, or python-stdlib (default): the standard library's source",
    )
    evaluate.add_argument("--dataset-config", help="the configuration's name, for a `datasets` name")
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
