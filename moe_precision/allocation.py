"""From an order of experts and a budget to a bit-width for each expert, and from signals to that order.

Pure functions; `allocate` puts them together into a plan. Methods are looked up by name in `METHODS`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_signals import signals_of_checkpoint
from .moe_layers import CAVEATS, find_moe_layers, root_model
from .plan import LayerPlan, PrecisionPlan, check_group_size, check_widths, model_type_of
from .router_norms import HistoryError, RouterNormHistory, router_norms

ZETA = 3.0  # how many times larger a MaxVar must be to overtake, as in the paper


class AllocationError(ValueError):
    """A budget that the given widths cannot meet, or a method that lacks what it reads."""


def rank_experts(change: Tensor, max_variance: Tensor | None = None, zeta: float = ZETA) -> list[int]:
    """Orders the experts of one layer, the one that gets the most bits first (arXiv 2604.06515).

    Ascending by the change of router norm; ties keep the order of the experts. Then one pass from the last expert to
    the first: an expert whose maximum variance is more than ``zeta`` times that of an expert before it moves in front
    of the first such one.

    Args:
        change: Change of router norm (or the final norm where no baseline is known), ``(E,)``.
        max_variance: Maximum intra-neuron variance, ``(E,)``, or None to order by the change alone.
        zeta: The factor of the reorder rule, positive.

    Returns:
        Expert indices.
    """
    if change.ndim != 1 or not change.isfinite().all():
        raise AllocationError(f"expected finite changes of shape (E,), got shape {tuple(change.shape)}: {change}")
    order = torch.argsort(change, stable=True).tolist()
    if max_variance is None:
        return order
    if max_variance.shape != change.shape or not max_variance.isfinite().all():
        raise AllocationError(f"expected {len(change)} finite variances, got {max_variance}")
    variance = max_variance.tolist()
    for expert in reversed(list(order)):
        place = order.index(expert)
        for earlier in range(place):
            if zeta * variance[order[earlier]] < variance[expert]:
                order.insert(earlier, order.pop(place))
                break
    return order


def bits_from_order(order: Sequence[int], average_bits: float, bits: Sequence[int]) -> list[int]:
    """Gives each expert of a layer a width by the paper's two- and three-level rules (arXiv 2604.06515).

    The total never exceeds ``E * average_bits`` and is the largest that the levels reach.

    Args:
        order: Expert indices, most bits first.
        average_bits: Bits an expert may have on average, between the lowest and the highest level.
        bits: One, two or three different levels; three must be equally spaced.

    Returns:
        Bits, indexed by expert.

    Raises:
        AllocationError: The levels or the average are out of range.
    """
    check_budget(average_bits, bits)
    if sorted(order) != list(range(len(order))):
        raise AllocationError(f"an order names every expert once, got {list(order)}")
    levels, average, count = sorted(set(bits)), _exact(average_bits), len(order)
    low, high = levels[0], levels[-1]
    spare = count * (average - low)  # bits to hand out above the lowest level
    if len(levels) == 1:
        widths = [low] * count
    elif len(levels) == 2:
        n_high = int(spare / (high - low))
        widths = [high] * n_high + [low] * (count - n_high)
    else:
        middle, span = levels[1], high - low
        units = int(spare / Fraction(span, 2))  # n_middle + 2 n_high
        if average > high - Fraction(span, 3):
            n_high = units // 2
        elif average >= high - Fraction(2 * span, 3):
            n_high = (2 * units - count) // 3  # the most with n_low <= n_middle
        else:
            n_high = 0
        n_high = min(max(n_high, units - count, 0), units // 2)
        n_middle = units - 2 * n_high
        widths = [high] * n_high + [middle] * n_middle + [low] * (count - n_high - n_middle)
    by_expert = [0] * count
    for expert, width in zip(order, widths, strict=True):
        by_expert[expert] = width
    return by_expert


def _exact(average_bits: float) -> Fraction:
    """The fraction that was meant: 2.3 and 8 / 3 are not the floats they are written as."""
    return Fraction(average_bits).limit_denominator(100_000)


def check_budget(average_bits: float, bits: Sequence[int]) -> None:
    """Checks levels and average before any work.

    Raises:
        AllocationError: More than three levels, unequal spacing, or an average outside of the levels.
    """
    if isinstance(bits, int) or not bits:
        raise AllocationError(f"bits must list the levels to choose from, as in (2, 3); got {bits!r}")
    levels = sorted(set(bits))
    check_widths(levels)
    if len(levels) > 3:
        raise AllocationError(f"the paper's rule takes one, two or three levels, got {len(levels)}: {levels}")
    if len(levels) == 3 and levels[1] - levels[0] != levels[2] - levels[1]:
        raise AllocationError(f"three levels must be equally spaced (as in 1, 2, 3 or 2, 3, 4), got {levels}")
    if not levels[0] <= average_bits <= levels[-1]:
        raise AllocationError(f"average_bits={average_bits} is outside of the levels {levels}; give levels around it")


@dataclass(frozen=True)
class LayerSignals:
    """What a method may look at: ``norm`` is the change of router norm, or the final norm without a baseline."""

    norm: Tensor  # (E,)
    max_variance: Tensor | None  # (E,)


def _order_router_norm(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return rank_experts(signals.norm, signals.max_variance)


def _order_reversed(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return _order_router_norm(signals, generator)[::-1]


def _order_random(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return torch.randperm(len(signals.norm), generator=generator).tolist()


def _order_uniform(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return list(range(len(signals.norm)))


METHODS: dict[str, Callable[[LayerSignals, torch.Generator], list[int]]] = {
    "router_norm": _order_router_norm,  # the paper; the default
    "reversed": _order_reversed,  # controls
    "random": _order_random,
    "uniform": _order_uniform,
}


def levels_of(method: str, average_bits: float, bits: Sequence[int]) -> list[int]:
    """The levels a method chooses from, after checking its name and budget; ``uniform`` has its average alone.

    Raises:
        AllocationError: Unknown method, or a budget that the levels cannot meet.
        PlanError: A width that is not 1 to 8 or 16.
    """
    if method not in METHODS:
        raise AllocationError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
    if method == "uniform":
        if average_bits not in range(17):
            raise AllocationError(f"method 'uniform' gives all experts one width: average_bits={average_bits} is none")
        bits = [int(average_bits)]
    check_budget(average_bits, bits)
    return sorted(set(bits))


def allocate(
    model: nn.Module | str | os.PathLike | None = None,
    history: RouterNormHistory | str | os.PathLike | None = None,
    method: str = "router_norm",
    average_bits: float = 2.5,
    bits: Sequence[int] = (2, 3),
    group_size: int = 128,
    seed: int = 0,
    router_pattern: str | None = None,
    expert_pattern: str | None = None,
) -> PrecisionPlan:
    """Makes a precision plan: a width for each expert, layer by layer, with the same counts in every layer.

    Args:
        model: The model, for its final router norms and its variances, or the folder of its checkpoint, which is read
            tensor by tensor without building the model; not needed if ``history`` holds them.
        history: Recorded router norms, the path of such a file, or the folder of the checkpoint that training started
            from: the change is measured from its first record, up to the model if there is one, else up to its last
            record. Without a history the final norm takes the place of
            the change, and the plan says ``"baseline": "none"``: its ranking then assumes equal norms at the start.
        method: A name from `METHODS`.
        average_bits: Nominal bits an expert may have on average.
        bits: The levels to choose from.
        group_size: Weights that share a scale and an offset, along the input dimension.
        seed: For ``method="random"``.
        router_pattern: As in `find_moe_layers`, where ``model`` needs it; a history brings its own.
        expert_pattern: The same for the experts.

    Raises:
        AllocationError: Levels, average or method are out of range, or a norm is not finite.
        PlanError: The group size does not divide an expert's input width.
        HistoryError: The history is empty or of another model.
        MoELayerError: The model has no Mixture-of-Experts layer.
        CheckpointError: A checkpoint folder is incomplete or damaged.
        StreamingError: A checkpoint cannot be read tensor by tensor; load it and give the model.
    """
    levels = levels_of(method, average_bits, bits)
    given = {"router_pattern": router_pattern, "expert_pattern": expert_pattern}
    patterns = {key: pattern for key, pattern in given.items() if pattern is not None}
    settings: dict[str, Any] = {"average_bits": average_bits, "bits": levels}
    for key, source in (("initial", history), ("final", model)):
        if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
            settings[key] = os.path.basename(os.path.abspath(source))
    if isinstance(history, (str, os.PathLike)):
        is_folder = os.path.isdir(history)
        history = signals_of_checkpoint(history, False, patterns) if is_folder else RouterNormHistory.load(history)
    if history is not None and not history.steps:
        raise HistoryError("the history holds no record")
    if model is not None:
        patterns = patterns or (history.patterns if history is not None else {})
        final = (
            _measured(model, patterns) if isinstance(model, nn.Module) else signals_of_checkpoint(model, True, patterns)
        )
        if history is not None and history.layers != final.layers:
            raise HistoryError(
                f"the history is of another model: it has layers {list(history.layers)}, "
                f"the model has {list(final.layers)}, or their shapes differ"
            )
    elif history is None:
        raise AllocationError("allocate needs a model, a history, or both")
    elif len(history.steps) < 2:
        raise HistoryError("the history holds the baseline alone: no training step was recorded")
    else:
        final = history

    broken = final.not_finite() or (history.not_finite() if history is not None else None)
    if broken:
        raise AllocationError(f"{broken}: the weights are damaged or training has diverged, no plan can be made")

    generator = torch.Generator().manual_seed(seed)
    first_norms = None if history is None else history.first
    plans: dict[str, LayerPlan] = {}
    for name, shape in final.layers.items():
        check_group_size(group_size, name, shape.projections)
        last, variance = final.last[name], final.max_variance.get(name)
        norm = last if first_norms is None else last - first_norms[name]
        try:
            order = METHODS[method](LayerSignals(norm, variance), generator)
        except AllocationError as error:
            raise AllocationError(f"layer {name!r}: {error}") from error
        widths = bits_from_order(order, average_bits, levels)
        signals = {"final_router_norm" if first_norms is None else "router_norm_change": _readable(norm)}
        if variance is not None:
            signals["max_variance"] = _readable(variance)
        router_norms_of = {} if first_norms is None else {"first": _readable(first_norms[name])}
        plans[name] = LayerPlan(
            shape=shape,
            projection_bits={projection: list(widths) for projection in shape.projections},
            order=order,
            router_norms=router_norms_of | {"last": _readable(last)},
            signals=signals,
        )
    settings |= final.patterns
    if method in ("router_norm", "reversed"):
        settings["zeta"] = ZETA
        settings |= _reservations(final, history)
    if method == "random":
        settings["seed"] = seed
    return PrecisionPlan(
        model_type=final.model_type,
        layers=plans,
        group_size=group_size,
        asked_average_bits=average_bits,
        method=method,
        settings=settings,
        baseline_step=None if history is None else history.steps[0],
        last_step=None if history is None or model is not None else history.steps[-1],
    )


def _reservations(final: RouterNormHistory, history: RouterNormHistory | None) -> dict[str, Any]:
    """What an order by router norms rests on that a reader of the plan must know; each is warned of, too."""
    found: dict[str, Any] = {}

    def say(key: str, value: Any, text: str) -> None:
        found[key] = value
        warnings.warn(text + "; the plan says so", stacklevel=4)

    if history is None:
        spreads = sorted(float((n.max() - n.min()) / n.mean().clamp(min=1e-30)) for n in final.last.values())
        spread = {"median": _rounded(spreads[len(spreads) // 2]), "largest": _rounded(spreads[-1])}
        say(
            "assumes_equal_initial_norms",
            {"spread_of_final_norms": spread},
            "no baseline is known: experts are ranked by their final router norm, as if all norms of a layer had been "
            f"equal before training. Within a layer the final norms spread over {spread['median']:.1%} of their mean "
            f"(median layer) to {spread['largest']:.1%} (largest)",
        )
    else:
        unmoved = [name for name, norms in final.last.items() if torch.equal(norms, history.first[name])]
        if unmoved:
            say(
                "layers_without_change",
                unmoved,
                f"the routers of {len(unmoved)} layers did not change at all, the first is {unmoved[0]!r}: are they "
                "frozen? Their experts are ranked by variance and index alone",
            )
    if not final.max_variance:
        say(
            "max_variance",
            "not measured",
            "the maximum intra-neuron variances are not known (training ended before they were measured): experts are "
            "ranked by the change of router norm alone. Give the checkpoint too to have them measured",
        )
    if final.caveats:
        say(
            "router_caveats",
            dict(final.caveats),
            f"{caveat_text(final.caveats)}; their experts are ranked all the same",
        )
    return found


def caveat_text(caveats: dict[str, str]) -> str:
    """One sentence a kind of router whose norm is not what it is elsewhere."""
    kinds = dict.fromkeys(caveats.values())
    of_kind = {kind: [name for name, one in caveats.items() if one == kind] for kind in kinds}
    return "; ".join(
        f"the router of {len(names)} layers ({names[0]!r}, ...) {CAVEATS[kind]}" for kind, names in of_kind.items()
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _measured(model: nn.Module, patterns: dict[str, Any]) -> RouterNormHistory:
    """The model's norms and variances as they are now."""
    layers = find_moe_layers(model, **patterns)
    final = RouterNormHistory.of(layers, model_type_of(root_model(model)), patterns)
    final.record(0, router_norms(layers))
    final.measure_variance(layers)
    return final


def _readable(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]  # what a float32 holds, and no more digits
