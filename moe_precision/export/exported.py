"""What an export is, and what every target checks first: its widths, and whether experts of a layer may differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MoEPrecisionError
from ..plans.plan import PrecisionPlan

ENGINES = ("vllm", "sglang")
GPTQ_OF_ENGINES = (4, 8)  # their widths for the experts of a checkpoint in GPTQ's packing


class ExportError(MoEPrecisionError, ValueError):
    """A plan that a target cannot carry out, or whose experts it has no name for."""


@dataclass(frozen=True)
class Exported:
    """A plan as another tool's config.

    Attributes:
        config: The tool's own config as plain Python: what its API takes.
        text: The config as its file holds it.
        plan: The plan as the target carries it out, after rounding widths that it does not have.
        notes: What a user has to know, one sentence each: what was rounded, what is left to the tool.
    """

    config: Any
    text: str
    plan: PrecisionPlan
    notes: tuple[str, ...]


def widths_of(plan: PrecisionPlan) -> set[int]:
    """All widths that occur in a plan."""
    return {bits for layer in plan.layers.values() for bank in layer.projection_bits.values() for bits in bank}


def with_widths(plan: PrecisionPlan, have: Sequence[int], target: str) -> tuple[PrecisionPlan, list[str]]:
    """The plan with every width rounded up to one that the target has.

    Args:
        plan: Any plan.
        have: The target's widths, ascending; 16 for matrices that are left alone is always among them.
        target: What to call the target in the note.

    Returns:
        The plan to carry out, and a note for each width that was rounded; none if it has them all.
    """
    return rounded(plan, lambda bits, layer, projection: next(b for b in (*have, 16) if b >= bits), target)


def rounded(plan: PrecisionPlan, to: Callable[[int, str, str], int], target: str) -> tuple[PrecisionPlan, list[str]]:
    """`with_widths` where the width depends on the matrix.

    Args:
        plan: Any plan.
        to: Takes bits, layer and projection, and returns the bits to export, never fewer.
        target: What to call the target in the note.
    """
    counts: Counter[tuple[int, int]] = Counter()
    layers = {}
    for name, layer in plan.layers.items():
        projections = {}
        for projection, widths in layer.projection_bits.items():
            projections[projection] = [to(bits, name, projection) for bits in widths]
            pairs = zip(widths, projections[projection], strict=True)
            counts.update((before, after) for before, after in pairs if before != after)
        layers[name] = replace(layer, projection_bits=projections)
    out = replace(plan, layers=layers)
    notes = [
        f"{target} has no {before}-bit format for {count} expert matrices: rounded up to {after} bits"
        for (before, after), count in sorted(counts.items())
    ]
    if notes:
        notes.append(f"the plan has {plan.average_bits:.4g} bits on average, the export {out.average_bits:.4g}")
    return out, notes


def check_granularity(plan: PrecisionPlan, finest: str, reason: str) -> None:
    """Checks that experts of a layer, and for ``finest="layer"`` their projections too, share a width.

    Raises:
        ExportError: They do not; the message holds the command that makes such a plan.
    """
    allowed = ("layer",) if finest == "layer" else ("layer", "layer+projection")
    if plan.granularity in allowed:
        return
    widths = sorted(widths_of(plan))
    raise ExportError(
        f"{reason}, and this plan has granularity {plan.granularity!r}. Make one that it can carry out, from the run's "
        "history and checkpoint (with --method weight_error where no curvature was recorded): moe-precision plan "
        f"HISTORY --final CHECKPOINT --method curvature --granularity {finest} --average-bits {plan.average_bits:.4g} "
        f"--bits {' '.join(map(str, widths))} --group-size {plan.group_size} -o plan.{finest}.json"
    )


def for_engine(
    plan: PrecisionPlan, engine: str | None, tool: str, have: Sequence[int], packing: str, served: Sequence[int]
) -> tuple[PrecisionPlan, list[str]]:
    """`with_widths` for a tool, or for an inference engine that serves its checkpoints with one format per layer.

    Args:
        plan: Any plan.
        engine: None for the tool's own loader.
        tool: What to call the tool in the notes.
        have: Widths of the tool.
        packing: What to call the form of its checkpoints.
        served: Widths of the engines in that form.

    Raises:
        ExportError: An unknown engine, or experts or projections of a layer that differ.
    """
    if engine is None:
        return with_widths(plan, have, tool)
    if engine not in ENGINES:
        raise ExportError(f"engine={engine!r} is not one of {', '.join(ENGINES)}")
    check_granularity(plan, "layer", f"{engine} serves all experts of a layer, gate, up and down, in one format")
    return with_widths(plan, served, f"{engine} with {packing}")
