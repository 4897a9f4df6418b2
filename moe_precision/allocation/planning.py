"""The part of `allocate` that measures nothing: from settings, snapshots and costs to a plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..layers.routers import CAVEATS
from ..plans.layer_plan import LayerPlan
from ..plans.methods import reads
from ..plans.notes import PlanNotes
from ..plans.numbers import AllocationError
from ..plans.plan import PrecisionPlan
from ..plans.settings import PlanSettings
from .costs import Costs, shuffled_costs
from .knapsack import least_cost_bits
from .orders import ORDERS, LayerSignals, bits_from_orders
from .snapshot import Snapshot

_STACKLEVEL = 5  # warnings point at the caller of `allocate`
_NOTHING = 5e-5  # bits per expert weight: four digits of a budget


def plan_from_signals(
    settings: PlanSettings,
    final: Snapshot,
    baseline: Snapshot | None,
    costs: Costs | None = None,
    notes: PlanNotes | None = None,
    tokens: Mapping[str, Tensor] | None = None,
) -> PrecisionPlan:
    """Makes a plan from what was measured.

    Args:
        settings: What is asked.
        final: The trained model.
        baseline: The start of training; its loads are used where ``final`` has none. None if it is not known.
        costs: What each level costs, for a method that knows costs; ``shuffled_curvature`` shuffles curvature's.
        notes: What was found already.
        tokens: Layer name -> tokens that the statistics saw each expert with, ``(E,)``; for settings with 0 bits.

    Raises:
        AllocationError: A signal that the method reads is missing, or the budget is out of range.
        PlanError: The group size does not divide an expert's input width.
    """
    settings.check_fits(final.layers)
    found = dict(notes or {})
    if settings.knows_costs:
        layers = _by_cost(settings, final, baseline, costs, found, tokens)
    else:
        layers = _by_order(settings, final, baseline)
    if reads(settings.method, "norm_change"):
        found |= _reservations(settings, final, baseline)
    plan = PrecisionPlan(
        model_type=final.model_type,
        layers=layers,
        group_size=settings.group_size,
        method=settings.method,
        settings=settings.with_patterns(final.patterns),
        notes=cast(PlanNotes, found),
        baseline_step=None if baseline is None else baseline.step or 0,
        last_step=final.step,
    )
    return noting_left_over(plan, settings)


def noting_left_over(plan: PrecisionPlan, settings: PlanSettings) -> PrecisionPlan:
    """The plan with a note of the bits per expert weight that it leaves of the budget of the settings, if it does."""
    if settings.average_bits is not None:
        left = settings.average_bits - plan.average_bits
    else:
        stored = settings.stored_budget({name: layer.shape for name, layer in plan.layers.items()})
        assert stored is not None
        left = stored - plan.stored_bits
    return plan if left < _NOTHING else replace(plan, notes=cast(PlanNotes, {**plan.notes, "left_over": rounded(left)}))


def _by_order(settings: PlanSettings, final: Snapshot, baseline: Snapshot | None) -> dict[str, LayerPlan]:
    """The experts of each layer in the method's order, and the paper's counts of widths."""
    generator = torch.Generator().manual_seed(settings.seed)
    loads = final.loads if baseline is None else baseline.loads or final.loads
    orders: dict[str, list[int]] = {}
    signals: dict[str, dict[str, Tensor | None]] = {}
    for name in final.layers:
        last, variance = final.router_norms[name], final.max_variance.get(name)
        change = None if baseline is None else last - baseline.router_norms[name]
        load = loads[name][0] if name in loads else None
        known = LayerSignals(last if change is None else change, last, variance, load, settings.zeta)
        try:
            orders[name] = ORDERS[settings.method](known, generator)
        except AllocationError as error:
            raise AllocationError(f"layer {name!r}: {error}") from error
        signals[name] = {
            "router_norm_change": change if reads(settings.method, "norm_change") else None,
            "final_router_norm": last if change is None or reads(settings.method, "final_norm") else None,
            "max_variance": variance if reads(settings.method, "max_variance") else None,
            "expert_load": load if reads(settings.method, "load") else None,
        }
    widths = bits_from_orders(orders, final.layers, settings)
    return {
        name: LayerPlan(
            shape=shape,
            projection_bits={projection: list(widths[name]) for projection in shape.projections},
            order=orders[name],
            router_norms=_norms(name, final, baseline),
            signals={key: _readable(values) for key, values in signals[name].items() if values is not None},
        )
        for name, shape in final.layers.items()
    }


def _by_cost(
    settings: PlanSettings,
    final: Snapshot,
    baseline: Snapshot | None,
    costs: Costs | None,
    notes: dict[str, Any],
    tokens: Mapping[str, Tensor] | None,
) -> dict[str, LayerPlan]:
    """The widths of least total cost, from one knapsack over all layers."""
    if costs is None:
        raise AllocationError(f"method {settings.method!r} needs what each width costs")
    if settings.method == "shuffled_curvature":
        costs = shuffled_costs(costs, settings.seed)
    seen = None if tokens is None or not settings.may_drop else {name: of.tolist() for name, of in tokens.items()}
    least = least_cost_bits(final.layers, costs, settings, seen)
    notes |= {"predicted_cost": rounded(least.cost), "gap": rounded(least.gap)}
    if least.indifferent:
        notes["without_gradient"] = least.indifferent
        warnings.warn(
            f"for {least.indifferent} of the choices all widths cost the same, as for experts that never had a "
            "gradient: they get the lowest width, and any bits that others leave over; the plan notes it",
            stacklevel=_STACKLEVEL,
        )
    plans = {}
    for name, shape in final.layers.items():
        by_width = {
            projection: {width: _readable(of[:, i]) for i, width in enumerate(settings.levels)}
            for projection, of in costs[name].items()
        }
        plans[name] = LayerPlan(
            shape=shape,
            projection_bits=least.bits[name],
            router_norms=_norms(name, final, baseline),
            signals={} if seen is None else {"tokens": seen[name], **_loads(name, final, baseline)},
            costs=by_width,
        )
    return plans


@dataclass(frozen=True)
class _Reservation:
    """An assumption behind an order by router norms, which a reader of the plan must know."""

    key: str
    value: Any
    warning: str


def _reservations(settings: PlanSettings, final: Snapshot, baseline: Snapshot | None) -> dict[str, Any]:
    """Notes of an order by router norms; a warning is given for each of them."""
    checks: tuple[Callable[[], _Reservation | None], ...] = (
        (lambda: _equal_norms_assumed(final)) if baseline is None else (lambda: _unmoved(final, baseline)),
        lambda: None if final.max_variance or not reads(settings.method, "max_variance") else _NOT_MEASURED,
        lambda: _caveats(final),
    )
    found = {}
    for check in checks:
        if (one := check()) is not None:
            found[one.key] = one.value
            warnings.warn(f"{one.warning}; the plan notes it", stacklevel=_STACKLEVEL)
    return found


_NOT_MEASURED = _Reservation(
    "max_variance",
    "not measured",
    "the maximum intra-neuron variances are not known (training ended before they were measured): experts are ranked "
    "by the change of router norm alone. Give the checkpoint too to have them measured",
)


def _equal_norms_assumed(final: Snapshot) -> _Reservation:
    spreads = sorted(float((n.max() - n.min()) / n.mean().clamp(min=1e-30)) for n in final.router_norms.values())
    spread = {"median": rounded(spreads[len(spreads) // 2]), "largest": rounded(spreads[-1])}
    return _Reservation(
        "spread_of_final_norms",
        spread,
        "no baseline is known: experts are ranked by their final router norm, as if all norms of a layer had been "
        f"equal before training. Within a layer the final norms spread over {spread['median']:.1%} of their mean "
        f"(median layer) to {spread['largest']:.1%} (largest)",
    )


def _unmoved(final: Snapshot, baseline: Snapshot) -> _Reservation | None:
    names = [name for name, norms in final.router_norms.items() if torch.equal(norms, baseline.router_norms[name])]
    if not names:
        return None
    return _Reservation(
        "layers_without_change",
        names,
        f"the routers of {len(names)} layers did not change at all, the first is {names[0]!r}: are they frozen? Their "
        "experts are ranked by variance and index alone",
    )


def _caveats(final: Snapshot) -> _Reservation | None:
    if not final.caveats:
        return None
    return _Reservation(
        "router_caveats", dict(final.caveats), f"{caveat_text(final.caveats)}; their experts are ranked nevertheless"
    )


def caveat_text(caveats: dict[str, str]) -> str:
    """One sentence for each kind of router whose norm does not mean what it means elsewhere.

    Args:
        caveats: Layer name -> key of `CAVEATS`.
    """
    kinds = dict.fromkeys(caveats.values())
    of_kind = {kind: [name for name, one in caveats.items() if one == kind] for kind in kinds}
    return "; ".join(
        f"the router of {len(names)} layers ({names[0]!r}, ...) {CAVEATS[kind]}" for kind, names in of_kind.items()
    )


def _loads(name: str, final: Snapshot, baseline: Snapshot | None) -> dict[str, list[float]]:
    """What a dropped expert did in training, where it was counted: its tokens and their routing weight."""
    loads = final.loads if baseline is None else baseline.loads or final.loads
    if name not in loads:
        return {}
    known = zip(("expert_load", "routing_weight"), loads[name], strict=True)
    return {key: _readable(values) for key, values in known if values.isfinite().all()}


def _norms(name: str, final: Snapshot, baseline: Snapshot | None) -> dict[str, list[float]]:
    first = {} if baseline is None else {"first": _readable(baseline.router_norms[name])}
    return first | {"last": _readable(final.router_norms[name])}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _readable(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]  # what a float32 holds, and no more digits
