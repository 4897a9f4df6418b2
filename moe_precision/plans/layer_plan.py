"""One layer of a plan: the widths of its experts, and what led to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import mul

from ..layers.shape import LayerShape
from .document import Document
from .widths import DROPPED, PlanError


@dataclass(frozen=True)
class LayerPlan:
    """The widths of one layer's experts.

    Attributes:
        shape: The layer's router, number of experts and matrix shapes.
        projection_bits: Projection name -> bits, indexed by expert.
        order: Expert indices, most bits first; empty where the method has no order.
        router_norms: ``first`` (absent without a baseline) and ``last`` norm of each expert.
        signals: Every signal that ordered the experts, by name, indexed by expert.
        costs: Projection -> width -> what that width costs each expert, for a method that knows costs.
    """

    shape: LayerShape
    projection_bits: dict[str, list[int]]
    order: list[int] = field(default_factory=list)
    router_norms: dict[str, list[float]] = field(default_factory=dict)
    signals: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    @property
    def bits(self) -> list[int]:
        """Bits of each expert.

        Raises:
            PlanError: An expert's projections have different widths; then read `projection_bits`.
        """
        first, *others = self.projection_bits.values()
        if any(other != first for other in others):
            raise PlanError("projections of one expert have different bits here: read .projection_bits")
        return list(first)

    @property
    def dropped(self) -> list[int]:
        """Experts at 0 bits, in order."""
        widths = next(iter(self.projection_bits.values()))
        return [expert for expert, bits in enumerate(widths) if bits == DROPPED]

    @property
    def mean_bits(self) -> list[float]:
        """Bits of each expert, the mean over its weights where its projections have different widths."""
        sizes = [out * inp for out, inp in self.shape.projections.values()]
        by_expert = zip(*(self.projection_bits[name] for name in self.shape.projections), strict=True)
        return [sum(map(mul, sizes, widths)) / sum(sizes) for widths in by_expert]

    def to_dict(self) -> Document:
        """The layer as the plan's file holds it."""
        shapes = self.shape.projections
        entry: Document = {
            "router": self.shape.router,
            "num_experts": self.shape.num_experts,
            "projections": {p: {"shape": list(shapes[p]), "bits": b} for p, b in self.projection_bits.items()},
        }
        costs = {p: {str(bits): values for bits, values in by.items()} for p, by in self.costs.items()}
        optional: Document = {"experts": self.shape.experts, "top_k": self.shape.top_k, "order": self.order}
        optional |= {"router_norms": self.router_norms, "signals": self.signals, "costs": costs}
        return entry | {key: value for key, value in optional.items() if value}

    @classmethod
    def from_dict(cls, entry: Document) -> LayerPlan:
        """Inverse of `to_dict`, for an entry that was validated."""
        projections, costs = entry["projections"], entry.get("costs", {})
        shapes = {p: (int(v["shape"][0]), int(v["shape"][1])) for p, v in projections.items()}
        return cls(
            shape=LayerShape(
                entry["router"], int(entry["num_experts"]), shapes, entry.get("experts", ""), entry.get("top_k")
            ),
            projection_bits={p: [int(bits) for bits in v["bits"]] for p, v in projections.items()},
            order=list(entry.get("order", [])),
            router_norms=dict(entry.get("router_norms", {})),
            signals=dict(entry.get("signals", {})),
            costs={p: {int(bits): list(values) for bits, values in by.items()} for p, by in costs.items()},
        )
