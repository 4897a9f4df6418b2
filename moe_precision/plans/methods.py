"""The registry of allocation methods: what each reads, whether it is a control, and where it comes from.

Every list of methods in the package, in the command line and in messages is derived from `METHODS`. The code of a
method that orders experts is in `allocation/orders.py` under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "auto",
    "router_norm",
    "norm_only",
    "final_norm",
    "max_variance",
    "load",
    "least_load",
    "reversed",
    "random",
    "uniform",
    "weight_error",
    "curvature",
    "statistics",
    "shuffled_curvature",
    "sensitivity",
]
Signal = Literal[
    "norm_change", "final_norm", "max_variance", "load", "weights", "curvature", "statistics", "calibration"
]

PAPER = "arXiv 2604.06515"
AUTO: MethodName = "auto"  # not in the registry: it stands for one of the methods there, see `chosen`
AUTO_SUMMARY = "statistics where there are any, else curvature, else router_norm; the plan says which and why"


@dataclass(frozen=True)
class Method:
    """One way to choose widths.

    Attributes:
        name: What users write.
        summary: What it does, in half a line.
        reads: Signals without which it cannot work. Where there is no ``norm_change``, the final norm stands in for it;
            an order by norm also works without variances. Either is noted in the plan.
        source: Where the rule comes from.
        control: A yardstick, not a method to use: never the winner of a comparison.
        seeded: It draws by the settings' seed; a comparison takes the mean over several draws.
        knows_costs: It knows what each width costs each expert and solves one knapsack over all layers; else it orders
            the experts of each layer, and the paper's rule turns the order into widths.
        prices_dropping: It also knows what an expert's absence costs (0 bits). Costs that count errors one by one do
            not: the weights of a row add up in the output.
    """

    name: MethodName
    summary: str
    reads: frozenset[Signal]
    source: str
    control: bool = False
    seeded: bool = False
    knows_costs: bool = False
    prices_dropping: bool = False


def _method(name: MethodName, summary: str, *reads: Signal, source: str, **kind: bool) -> Method:
    return Method(name, summary, frozenset(reads), source, **kind)


METHODS: dict[MethodName, Method] = {
    method.name: method
    for method in (
        _method(
            "router_norm",
            "smallest change of router norm first (the paper)",
            "norm_change",
            "max_variance",
            source=PAPER,
        ),
        _method("norm_only", "the paper's rule without variances", "norm_change", source=f"ablation of {PAPER}"),
        _method(
            "final_norm",
            "smallest final router norm first",
            "final_norm",
            "max_variance",
            source=f"ablation of {PAPER}",
        ),
        _method("max_variance", "largest intra-neuron variance first", "max_variance", source=f"ablation of {PAPER}"),
        _method("load", "experts with the most tokens first", "load", source="common practice"),
        _method("least_load", "experts with the fewest tokens first", "load", source="control of load", control=True),
        _method(
            "reversed",
            "the paper's order reversed",
            "norm_change",
            "max_variance",
            source="control of router_norm",
            control=True,
        ),
        _method("random", "a random order", source="control of every order", control=True, seeded=True),
        _method("uniform", "one width for all experts", source="control of every plan", control=True),
        _method("weight_error", "least squared error of the weights", "weights", source="own", knows_costs=True),
        _method(
            "curvature",
            "least predicted increase of the loss, by second moments of the gradient",
            "weights",
            "curvature",
            source="own; the diagonal of the empirical Fisher matrix, as in optimal brain damage (LeCun et al., 1989)",
            knows_costs=True,
        ),
        _method(
            "statistics",
            "least predicted increase of the loss, by squared gradients and second moments of the inputs",
            "weights",
            "curvature",
            "statistics",
            source="own; a Fisher matrix of two factors, as in K-FAC (arXiv 1503.05671), the output's one a diagonal",
            knows_costs=True,
            prices_dropping=True,
        ),
        _method(
            "shuffled_curvature",
            "costs of curvature, given to the wrong experts of the layer",
            "weights",
            "curvature",
            source="control of curvature",
            control=True,
            seeded=True,
            knows_costs=True,
        ),
        _method(
            "sensitivity",
            "measured increase of the loss, one expert matrix at a time; only in compare",
            "weights",
            "calibration",
            source="reference for all signals",
            knows_costs=True,
            prices_dropping=True,
        ),
    )
}
ALL_METHODS: tuple[MethodName, ...] = tuple(METHODS)
ORDER_METHODS: tuple[MethodName, ...] = tuple(m.name for m in METHODS.values() if not m.knows_costs)
COST_METHODS: tuple[MethodName, ...] = tuple(m.name for m in METHODS.values() if m.knows_costs)
DROPPING_METHODS: tuple[MethodName, ...] = tuple(m.name for m in METHODS.values() if m.prices_dropping)
PLAN_METHODS: tuple[MethodName, ...] = (AUTO, *(m.name for m in METHODS.values() if "calibration" not in m.reads))
SEEDED: tuple[MethodName, ...] = tuple(m.name for m in METHODS.values() if m.seeded)
CONTROLS: tuple[MethodName, ...] = tuple(m.name for m in METHODS.values() if m.control)


def reads(method: str, *signals: Signal) -> bool:
    """Whether a method reads any of these signals; False for a method that is not in the registry."""
    return any(not known.reads.isdisjoint(signals) for known in METHODS.values() if known.name == method)


def chosen(model: bool, curvature: bool, statistics: bool) -> tuple[MethodName, str]:
    """What ``method="auto"`` stands for, and why, in words.

    Args:
        model: Whether there are weights to quantize.
        curvature: Whether squared gradients or the optimizer's second moments are known.
        statistics: Whether the second moments of the experts' inputs are known.
    """
    if not curvature:
        return "router_norm", "without curvature, what a width costs the loss is not known"
    if not model:
        return "router_norm", "without the trained weights, no width's cost can be measured"
    if not statistics:
        return "curvature", "there is curvature, and there are no expert statistics"
    return "statistics", "there are curvature and expert statistics"
