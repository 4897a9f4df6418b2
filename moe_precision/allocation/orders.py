"""The paper's rule and its controls: from signals to an order of the experts of a layer, and from that to widths.

Pure functions. `ORDERS` holds the order of every method in `plans/methods.py` that does not know costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..layers.shape import LayerShape
from ..plans.levels import check_budget
from ..plans.methods import MethodName
from ..plans.numbers import AllocationError, exact
from ..plans.settings import ZETA, PlanSettings


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

    Example:
        >>> import torch
        >>> rank_experts(torch.tensor([0.3, -0.1, 0.2]))
        [1, 2, 0]
        >>> rank_experts(torch.tensor([0.3, -0.1, 0.2]), max_variance=torch.tensor([4.0, 1.0, 1.0]))
        [0, 1, 2]
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


def bits_from_order(order: Sequence[int], average_bits: float | Fraction, bits: Sequence[int]) -> list[int]:
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

    Example:
        >>> bits_from_order([1, 2, 0, 3], average_bits=2.5, bits=(2, 3))
        [2, 3, 3, 2]
    """
    check_budget(average_bits, bits)
    if sorted(order) != list(range(len(order))):
        raise AllocationError(f"an order names every expert once, got {list(order)}")
    levels, average, count = sorted(set(bits)), exact(average_bits), len(order)
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


def bits_from_orders(
    orders: Mapping[str, Sequence[int]], layers: Mapping[str, LayerShape], settings: PlanSettings
) -> dict[str, list[int]]:
    """`bits_from_order` for every layer of a model.

    Under a budget in nominal bits each layer is rounded down on its own, as in the paper. Under one in stored bits or
    in bytes, what a layer leaves over goes on to the next, so that less than one step of one expert is left in all.

    Args:
        orders: Layer name -> expert indices, most bits first.
        layers: Layer name -> shape, in module order.
        settings: The budget and the levels.

    Returns:
        Layer name -> bits, indexed by expert.

    Raises:
        AllocationError: The levels or the budget are out of range.
    """
    average, highest = exact(settings.nominal_bits(layers)), Fraction(max(settings.levels))
    found = {}
    left = Fraction(0)  # bits
    for name, shape in layers.items():
        experts = len(orders[name])
        share = min(average + left / (experts * shape.expert_size), highest)
        found[name] = bits_from_order(orders[name], share, settings.levels)
        if settings.average_bits is None:
            left += (average * experts - sum(found[name])) * shape.expert_size
    return found


@dataclass(frozen=True)
class LayerSignals:
    """What a method may look at: ``norm`` is the change of router norm, or the final norm without a baseline."""

    norm: Tensor  # (E,)
    last: Tensor  # (E,), the final norm
    max_variance: Tensor | None  # (E,)
    load: Tensor | None = None  # (E,), tokens
    zeta: float = ZETA


def _order_router_norm(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return rank_experts(signals.norm, signals.max_variance, signals.zeta)


def _order_norm_only(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return rank_experts(signals.norm)


def _order_final_norm(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return rank_experts(signals.last, signals.max_variance, signals.zeta)


def _order_max_variance(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    if signals.max_variance is None:
        raise AllocationError("method 'max_variance' needs variances, which this history lacks: give the model too")
    return rank_experts(-signals.max_variance)


def _order_load(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    if signals.load is None:
        raise AllocationError(
            "no tokens were counted, as load needs: give a history that RouterNormMonitor has written, of a model "
            "whose experts are called with their indices or are modules of their own"
        )
    return rank_experts(-signals.load)


def _order_least_load(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return _order_load(signals, generator)[::-1]


def _order_reversed(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return _order_router_norm(signals, generator)[::-1]


def _order_random(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return torch.randperm(len(signals.norm), generator=generator).tolist()


def _order_uniform(signals: LayerSignals, generator: torch.Generator) -> list[int]:
    return list(range(len(signals.norm)))


ORDERS: dict[MethodName, Callable[[LayerSignals, torch.Generator], list[int]]] = {
    "router_norm": _order_router_norm,
    "norm_only": _order_norm_only,
    "final_norm": _order_final_norm,
    "max_variance": _order_max_variance,
    "load": _order_load,
    "least_load": _order_least_load,
    "reversed": _order_reversed,
    "random": _order_random,
    "uniform": _order_uniform,
}
