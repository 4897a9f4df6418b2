"""``moe-precision estimate``: what a model takes at any width, from its config.json alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from rich import box
from rich.table import Table

from ..checkpoints.blueprint import ASSUMED_DTYPE, model_of, stated_dtype
from ..layers.patterns import Patterns
from ..plans.plan import PrecisionPlan
from ..present.tables import show
from ..quantize.sizes import GIB, ModelSizes
from ..recording.collecting import MEMORY_GIB, memory_bytes, passes
from ..recording.statistics import file_bytes
from .options import Commands, add_command, add_layout, add_output

DEFAULT_BITS = (8, 4, 3, 2.5, 2, 1.5)
_PARTS = ("experts_gib", "rest_gib", "total_gib")


def run(options: argparse.Namespace) -> None:
    """Prints the tables."""
    plan = None if options.plan is None else PrecisionPlan.load(options.plan)
    if plan is not None and options.group_size not in (None, plan.group_size):
        raise ValueError(f"--group-size {options.group_size}: {options.plan!r} has {plan.group_size}; leave it out")
    asked = {key: getattr(options, key) for key in ("router_pattern", "expert_pattern", "layout")}
    given = cast(Patterns, {key: value for key, value in asked.items() if value is not None})
    sizes = ModelSizes(
        model_of(options.source),
        given or (Patterns() if plan is None else plan.patterns),
        options.group_size if plan is None else plan.group_size,
        options.non_expert_bits,
    )
    options.document = print_sizes(
        sizes, options.average_bits, plan, options.expert_gib, options.total_gib, options.statistics_memory
    )
    options.document["dtype_is_assumed"] = assumed = stated_dtype(options.source) is None
    if assumed:
        print(
            f"dtype: {_name_of(ASSUMED_DTYPE)} is assumed, since config.json names none and no weights are beside "
            "it; in float32 the float model and the rest take twice as much"
        )


def print_sizes(
    sizes: ModelSizes,
    average_bits: Sequence[float] = DEFAULT_BITS,
    plan: PrecisionPlan | None = None,
    expert_gib: float | None = None,
    total_gib: float | None = None,
    statistics_memory: float = MEMORY_GIB,
) -> dict[str, Any]:
    """Prints what a model takes, and returns it as plain types.

    Args:
        sizes: Of the model.
        average_bits: Widths, and averages of several, of 1 to 8.
        plan: Gets a row.
        expert_gib: A budget to fit into.
        total_gib: A budget to fit into, of the whole model.
        statistics_memory: GiB for second moments that are collected together.

    Raises:
        ValueError: An average is not 1 to 8.
        PlanError: The plan is for another model.
        AllocationError: A budget is less than the experts take at 1 bit.
    """
    wrong = [bits for bits in average_bits if not 1 <= bits <= 8]
    if wrong:
        raise ValueError(f"--average-bits {wrong[0]:g}: expected 1 to 8")
    rows = [(f"float ({_name_of(sizes.dtype)})", sizes.stored_bits(16))]
    if plan is not None:
        rows.append((f"plan, {plan.average_bits:.4g} bits on average", sizes.stored_bits_of(plan)))
    for bits in sorted(set(average_bits), reverse=True):
        name = f"uniform {bits:g} bits" if bits == int(bits) else f"{bits:g} bits on average"
        rows.append((name, sizes.stored_bits(bits)))
    fits = [
        (f"{option} {value:g}", sizes.fit(**{key: value}))
        for option, key, value in (("--expert-gib", "expert_gib", expert_gib), ("--total-gib", "total_gib", total_gib))
        if value is not None
    ]
    show(_table(sizes, rows))
    for option, fit in fits:
        if fit.uniform == 16:
            print(f"{option}: the model fits as it is")
            continue
        levels, widest = " and ".join(map(str, fit.levels)), f"{fit.uniform} bit{'s' if fit.uniform > 1 else ''}"
        print(
            f"{option}: {fit.expert_gib:.4g} GiB for the experts, {fit.stored_bits:.4g} stored bits per weight, "
            f"{fit.average_bits:.4g} on average: levels around it are {levels}, and all experts fit at {widest}"
        )
    print(_statistics(sizes, statistics_memory))
    _, stored = rows[min(1, len(rows) - 1)]  # of the plan, else of the widest row
    quantizing = sizes.quantizing_bytes(stored) / GIB
    print(
        f"quantizing: at most {quantizing:.4g} GiB for each process, beside its imports: twice the largest layer "
        f"({sizes.largest_layer or 'one'}) and one packed file"
    )
    return {
        "model_type": sizes.model_type,
        "parameters": sizes.parameters,
        "expert_weights": sizes.weights,
        "group_size": sizes.group_size,
        "rows": {
            name: dict(zip(_PARTS, _gib(sizes, bits), strict=True)) | {"stored_bits": bits} for name, bits in rows
        },
        "fits": {option: asdict(fit) for option, fit in fits},
        "statistics_memory_gib": memory_bytes(sizes.layers) / GIB,
        "statistics_file_gib": file_bytes(sizes.layers) / GIB,
        "quantizing_gib": quantizing,
    }


def _name_of(dtype: torch.dtype) -> str:
    """As users write it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _gib(sizes: ModelSizes, stored: float) -> tuple[float, float, float]:
    """GiB of the experts, of the rest and in total at so many stored bits."""
    experts = sizes.expert_bytes(stored)
    total = sizes.float_bytes if stored == sizes.stored_bits(16) else experts + sizes.rest_bytes
    return experts / GIB, (total - experts) / GIB, total / GIB


def _statistics(sizes: ModelSizes, memory: float) -> str:
    """What collecting statistics takes, in words."""
    needed, largest = memory_bytes(sizes.layers) / GIB, max(memory_bytes([layer]) for layer in sizes.layers) / GIB
    if largest > memory:
        within = f"{largest:.4g} GiB of them for one layer, which is more than --statistics-memory {memory:g}"
    elif (count := len(passes(sizes.layers, memory))) > 1:
        within = f"in {count} passes over the text, within {memory:g} GiB"
    else:
        within = "in one pass over the text"
    return (
        f"statistics: {needed:.4g} GiB of second moments beside the float model, {within}; "
        f"a file of {file_bytes(sizes.layers) / GIB:.4g} GiB"
    )


def _table(sizes: ModelSizes, rows: list[tuple[str, float]]) -> Table:
    first = sizes.layers[0]
    title = (
        f"{sizes.model_type}: {sizes.parameters:,} parameters, {sizes.weights:,} of them "
        f"in the routed experts of {len(sizes.layers)} layers ({first.num_experts} experts in {first.name}), "
        f"group size {sizes.group_size}"
    )
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for column in ("experts at", "stored bits", "experts GiB", "rest GiB", "total GiB", "of float"):
        table.add_column(column, justify="left" if column == "experts at" else "right")
    for name, stored in rows:
        parts = _gib(sizes, stored)
        cells = [f"{gib:.4g}" for gib in parts]
        table.add_row(name, f"{stored:.4g}", *cells, f"{parts[-1] * GIB / sizes.float_bytes:.1%}")
    return table


def add_to(commands: Commands) -> None:
    """Declares the command."""
    command = add_command(
        commands,
        "estimate",
        run,
        "moe-precision estimate runs/demo/checkpoint --average-bits 3 2.5 2 --total-gib 0.01\n"
        "  moe-precision estimate config.json --plan precision_plan.json",
    )
    command.add_argument("source", help="a config.json, or a folder that holds one; no weights are needed")
    command.add_argument("--plan", metavar="PLAN", help="a plan's JSON file, which gets a row")
    command.add_argument(
        "--average-bits",
        type=float,
        nargs="+",
        default=list(DEFAULT_BITS),
        metavar="BITS",
        help="a row for each: a width, or an average of several (default 8 4 3 2.5 2 1.5)",
    )
    command.add_argument("--expert-gib", type=float, metavar="GIB", help="what fits, if the experts may take this")
    command.add_argument("--total-gib", type=float, metavar="GIB", help="what fits, if the whole model may take this")
    command.add_argument(
        "--group-size", type=int, help="weights that share a scale (default: the largest of 128, 64 and 32 that fits)"
    )
    command.add_argument(
        "--non-expert-bits", type=int, choices=[4, 8], help="the other linear layers are quantized too"
    )
    command.add_argument(
        "--statistics-memory",
        type=float,
        default=MEMORY_GIB,
        metavar="GIB",
        help=f"memory for statistics that are collected together (default {MEMORY_GIB:g})",
    )
    command.add_argument("--router-pattern", metavar="REGEX", help="names the routers' weights; see find_moe_layers")
    command.add_argument("--expert-pattern", metavar="REGEX", help="names the experts' weights; see find_moe_layers")
    add_layout(command)
    add_output(command)
