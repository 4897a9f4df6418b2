"""A plan on one screen of 80 columns: what it rests on, and one line of widths per layer."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import Any

from ..plans.layer_plan import LayerPlan
from ..plans.plan import PrecisionPlan
from ..plans.widths import DROPPED

COLUMNS = 80
_MAP = 64  # characters of a layer's experts
_FLOAT = 16  # bits: left as it is


def plan_lines(plan: PrecisionPlan) -> list[str]:
    """What `moe-precision show` prints: the findings of a plan, then `bits_map`; no line is longer than 80."""
    wrapped = [line for text in findings(plan) for line in textwrap.wrap(text, COLUMNS, subsequent_indent="  ")]
    return [*wrapped, "", *bits_map(plan)]


def findings(plan: PrecisionPlan) -> list[str]:
    """What a plan rests on, what of its budget is left, and how far its prices are measured, a sentence each."""
    dropped = [dropped_text(plan)] if plan.drops else []
    return [_origin(plan), _budget(plan), *_measured(plan), _shares(plan), *dropped]


def dropped_text(plan: PrecisionPlan) -> str:
    """How many experts a plan drops, and what they had of the tokens and the routing weight where that was counted."""
    experts = sum(layer.shape.num_experts for layer in plan.layers.values())
    text = f"{sum(len(layer.dropped) for layer in plan.layers.values())} of {experts} experts dropped"
    shares = []
    for what, keys in (("tokens", ("expert_load", "tokens")), ("routing weight", ("routing_weight",))):
        key = next((key for key in keys if all(key in layer.signals for layer in plan.layers.values())), None)
        if key is not None:
            lost = sum(layer.signals[key][expert] for layer in plan.layers.values() for expert in layer.dropped)
            every = sum(sum(layer.signals[key]) for layer in plan.layers.values())
            shares += [f"{lost / every:.1%} of the {what}"] if every else []
    return text + (f", which had {' and '.join(shares)}" if shares else "")


def bits_map(plan: PrecisionPlan) -> list[str]:
    """One line per layer: its index, its mean, and a digit for each expert, or for a few where they are many.

    Layers whose names differ in their numbers alone stand below one heading.
    """
    lines: list[str] = []
    heading = ""
    differ = any(len(set(map(tuple, layer.projection_bits.values()))) > 1 for layer in plan.layers.values())
    for name, layer in plan.layers.items():
        experts = layer.shape.num_experts
        together = -(-experts // _MAP)
        of = "one digit per expert" if together == 1 else f"one digit for {together} experts"
        of += ", the mean of its matrices" if differ else ""
        text = f"{re.sub(r'[0-9]+', '{}', name)}: {experts} experts, {of}"
        if text != heading:
            lines += [*([""] if lines else []), *textwrap.wrap(text, COLUMNS, subsequent_indent="  ")]
            heading = text
        widths = layer.mean_bits
        parts = [widths[start : start + together] for start in range(0, experts, together)]
        index = ".".join(re.findall(r"\d+", name)) or "-"
        digits = "".join(_digit(sum(part) / len(part)) for part in parts)
        lines.append(f"{index:>5} {sum(widths) / experts:5.2f}  {digits}")
    if any("f" in line.rpartition(" ")[2] for line in lines):
        lines.append("f: left as it is, at 16 bits")
    return lines


def plan_document(plan: PrecisionPlan) -> dict[str, Any]:
    """The same as plain types, for ``--json``, with all widths."""
    notes = plan.notes
    return {
        "model_type": plan.model_type,
        "method": plan.method,
        "settings": None if plan.settings is None else plan.settings.to_dict(),
        "average_bits": plan.average_bits,
        "stored_bits": plan.stored_bits,
        "group_size": plan.group_size,
        "left_over": notes.get("left_over", 0.0),
        "priced_share": priced_share(plan),
        "calibration_tokens": notes.get("calibration_tokens", 0),
        "statistics": notes.get("statistics"),
        "share_by_bits": {str(bits): share for bits, share in share_by_bits(plan).items()},
        "bits": {name: layer.projection_bits for name, layer in plan.layers.items()},
    }


def share_by_bits(plan: PrecisionPlan) -> dict[int, float]:
    """Width -> its share of the expert weights, ascending."""
    weights: Counter[int] = Counter()
    for layer in plan.layers.values():
        for projection, widths in layer.projection_bits.items():
            out, inp = layer.shape.projections[projection]
            for bits in widths:
                weights[bits] += out * inp
    return {bits: weights[bits] / weights.total() for bits in sorted(weights)}


def priced_share(plan: PrecisionPlan) -> float:
    """Share of the expert weights for which widths were found to cost different amounts; 0 without costs.

    Experts without a gradient, or whose inputs were never seen, have no price: all widths cost them the same.
    """
    priced = total = 0
    for layer in plan.layers.values():
        for projection, (out, inp) in layer.shape.projections.items():
            total += out * inp * layer.shape.num_experts
            priced += out * inp * sum(_differ(layer, projection, e) for e in range(layer.shape.num_experts))
    return priced / total


def _differ(layer: LayerPlan, projection: str, expert: int) -> bool:
    costs = layer.costs.get(projection, {})
    return len({of_width[expert] for of_width in costs.values()}) > 1


def _origin(plan: PrecisionPlan) -> str:
    notes = plan.notes
    if "read_from" in notes:
        return f"{plan.model_type}, read from a checkpoint of {plan.method}"
    step = plan.baseline_step
    baseline = "no baseline: ranked by final norm" if step is None else f"baseline step {step}"
    if (spread := notes.get("spread_of_final_norms")) is not None:
        baseline += f", as if initial norms were equal (final norms spread up to {spread['largest']:.1%} per layer)"
    chosen = f" ({notes['auto']})" if "auto" in notes else ""
    edited = ", edited by hand" if notes.get("edited") else ""
    return f"{plan.model_type}, method {plan.method}{chosen}{edited}, {baseline}"


def _budget(plan: PrecisionPlan) -> str:
    if "read_from" in plan.notes:
        groups = " and ".join(map(str, plan.notes["group_sizes"])) or "none"
        what = "blocks" if plan.method == "gguf" else "groups"
        return f"{plan.average_bits:.4g} bits on average, {what}: {groups}"
    asked = "" if plan.settings is None else f"asked for {plan.settings.budget}, "
    left = plan.notes.get("left_over", 0.0)
    unused = f"{left:.2g} bits per weight left unused" if left else "nothing left unused"
    return (
        f"{asked}reached {plan.average_bits:.4g} bits on average, {plan.stored_bits:.4g} stored (group "
        f"{plan.group_size}); {unused}"
    )


def _measured(plan: PrecisionPlan) -> list[str]:
    """How far prices rest on measurements, and on how many tokens."""
    notes, lines = plan.notes, []
    if any(layer.costs for layer in plan.layers.values()):
        tokens = notes.get("calibration_tokens")
        how = f"calibrated on {tokens:,} tokens" if tokens else "not calibrated"
        text = f", measured on {notes['text']}" if "text" in notes else ""
        lines.append(f"priced by measurement: {priced_share(plan):.1%} of the expert weights, {how}{text}")
    elif "text" in notes:
        lines.append(f"measured on {notes['text']}")
    if "statistics" in notes:
        counts = list(notes["statistics"]["tokens"].values())
        medians = sorted(median for _, median, _ in counts)
        least, most = min(low for low, _, _ in counts), max(high for _, _, high in counts)
        lines.append(
            f"statistics: {least:,} tokens for the least seen expert, {medians[len(medians) // 2]:,} in the middle, "
            f"{most:,} for the most seen, from {notes['statistics']['text'] or 'text that they do not name'}"
        )
        if count := notes["statistics"].get("indefinite", 0):
            lines.append(f"fitted without statistics, since their second moments have negative eigenvalues: {count}")
    return lines


def _shares(plan: PrecisionPlan) -> str:
    shares = ", ".join(
        f"{share:.1%} " + {_FLOAT: "as they are", DROPPED: "dropped"}.get(bits, f"at {bits}")
        for bits, share in share_by_bits(plan).items()
    )
    return f"weights by bits: {shares}"


def _digit(mean: float) -> str:
    return "f" if mean == _FLOAT else str(min(int(mean + 0.5), 9))
