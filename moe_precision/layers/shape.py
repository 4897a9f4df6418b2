"""What histories and plans know of a layer: names and shapes, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """What a history and a plan know of a layer.

    Attributes:
        router: Clean name of the router's weight, ``(rows, d)`` with row ``e`` belonging to expert ``e``; a few
            families have more rows than experts (shared or null experts), which come last.
        num_experts: Number of routed experts ``E``.
        projections: Name of each expert matrix -> ``(out, in)``, in the order of the forward pass. Fused families
            name the parameter (``gate_up_proj``), others the path inside one expert (``wi``).
        experts: Module path of one expert, ``{expert}`` in place of its index, or, without it, of the module that
            holds the weights of all experts; empty for other layouts, and where a file from an earlier release does not
            state it.
        top_k: How many experts serve a token; None where the modules do not say.
    """

    router: str
    num_experts: int
    projections: dict[str, tuple[int, int]]
    experts: str = field(default="", compare=False)
    top_k: int | None = field(default=None, compare=False)

    @property
    def expert_size(self) -> int:
        """Weights of one expert, all matrices together."""
        return sum(out * inp for out, inp in self.projections.values())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerShape:
        """Inverse of `to_dict`."""
        shapes = {name: (int(out), int(inp)) for name, (out, inp) in data["projections"].items()}
        return cls(data["router"], data["num_experts"], shapes, data.get("experts", ""), data.get("top_k"))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints and JSON."""
        shapes = {name: list(shape) for name, shape in self.projections.items()}
        found = {"router": self.router, "num_experts": self.num_experts, "projections": shapes, "experts": self.experts}
        return found if self.top_k is None else {**found, "top_k": self.top_k}
