"""When a plan by router norms settled: how its bits change from record to record."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..allocation.orders import bits_from_orders, rank_experts
from ..plans.numbers import AllocationError
from ..plans.plan import PrecisionPlan
from ..plans.settings import PlanSettings
from ..recording.history import RouterNormHistory
from .thinning import evenly_thinned

_MAX_RECORDS = 500
_MAX_ORDERED = 1_500_000  # experts of all records together, seconds of work


@dataclass(frozen=True)
class Settling:
    """The plan by router norms at every record but the first, at one budget.

    Attributes:
        steps: Optimizer steps of these records.
        to_last: Share of experts whose bits differ from those at the last record.
        to_previous: Share of experts whose bits differ from those at the record before; None for the first.
        budget: The budget and the levels in words.
    """

    steps: list[int]
    to_last: list[float]
    to_previous: list[float | None]
    budget: str

    @property
    def settled_at(self) -> int:
        """The first step from which on no expert's bits differ from those at the end."""
        changed = [index for index, share in enumerate(self.to_last) if share > 0]
        return self.steps[changed[-1] + 1 if changed else 0]


def norm_settings(plan: PrecisionPlan | None) -> PlanSettings:
    """Settings for the paper's rule at a plan's budget: the two of its levels around it, or three where it is one.

    Without a plan, or with one that leaves nothing to choose, such as 2 bits for all, they are 2.5 bits of 2 and 3.
    """
    default = PlanSettings(method="router_norm")
    if plan is None:
        return default
    widths = {bits for layer in plan.layers.values() for of in layer.projection_bits.values() for bits in of}
    levels = sorted(widths | set(() if plan.settings is None else plan.settings.levels))
    average = round(plan.average_bits, 6)
    around = [level for level in levels if level < average][-1:] + [level for level in levels if level > average][:1]
    if len(around) < 2:
        return default
    if average in levels:
        around = [around[0], int(average), around[1]]
        if around[1] - around[0] != around[2] - around[1]:
            return default
    return PlanSettings(method="router_norm", average_bits=average, bits=around, group_size=plan.group_size)


def settling(history: RouterNormHistory, settings: PlanSettings) -> Settling | None:
    """How the plan by the change of router norms came to be, by the paper's rule without variances.

    Variances are measured at the end alone, so that they cannot tell how a plan changes.

    Args:
        history: The recorded norms.
        settings: Budget and levels, see `norm_settings`.

    Returns:
        None where fewer than three records, or norms that are not finite, leave nothing to compare.

    Example:
        >>> history = RouterNormHistory({"layer": LayerShape("gate", 2, {"up": (8, 8)})})
        >>> for step, norms in [(0, [1, 1]), (10, [3, 2]), (20, [2, 4]), (30, [2, 5])]:
        ...     history.record(step, torch.tensor(norms, dtype=torch.float32))
        >>> found = settling(history, PlanSettings(method="router_norm", average_bits=2.5, bits=(2, 3)))
        >>> found.to_last, found.settled_at
        ([1.0, 0.0, 0.0], 20)
    """
    if len(history.steps) < 3 or history.not_finite():
        return None
    experts = sum(shape.num_experts for shape in history.layers.values())
    most = max(2, min(_MAX_RECORDS, _MAX_ORDERED // experts))
    kept = [index + 1 for index in evenly_thinned(len(history.steps) - 1, most)]

    def bits_at(record: int) -> Tensor:
        orders = {name: rank_experts(change) for name, change in history.changes(record).items()}
        return torch.cat([torch.tensor(of) for of in bits_from_orders(orders, history.layers, settings).values()])

    try:
        plans = [bits_at(record) for record in kept]
    except AllocationError:  # a budget that no two levels give
        return None
    return Settling(
        steps=[history.steps[record] for record in kept],
        to_last=[_share(plan, plans[-1]) for plan in plans],
        to_previous=[None, *(_share(now, before) for before, now in pairwise(plans))],
        budget=f"{settings.budget} of levels {' and '.join(map(str, settings.levels))}",
    )


def _share(one: Tensor, other: Tensor) -> float:
    return float((one != other).double().mean())
