"""The same layers in another class of the same model: their names differ by what stands before all of them.

``AutoModel`` has ``layers.0.mlp`` where ``ForCausalLM`` has ``model.layers.0.mlp``, and a model of text and images has
``model.language_model.layers.0.mlp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from .shape import LayerShape

T = TypeVar("T")


@dataclass(frozen=True)
class Prefixes:
    """What stands before the names of all layers, on one side and on the other; each empty or with a dot at its end."""

    here: str
    there: str

    def __call__(self, name: str) -> str:
        """A name of this side as the other side has it; an empty one stays empty."""
        return self.there + name.removeprefix(self.here) if name else name

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return self.here == self.there

    def keys(self, by_layer: Mapping[str, T]) -> dict[str, T]:
        """A mapping by layer name, under the names of the other side."""
        return {self(name): value for name, value in by_layer.items()}

    def shape(self, shape: LayerShape) -> LayerShape:
        """A layer's shape with the names of the other side."""
        return replace(shape, router=self(shape.router), experts=self(shape.experts))

    def shapes(self, layers: Mapping[str, LayerShape]) -> dict[str, LayerShape]:
        """The shapes of all layers, under the names of the other side."""
        return {self(name): self.shape(shape) for name, shape in layers.items()}


def prefixes_of(here: Mapping[str, LayerShape], there: Mapping[str, LayerShape]) -> Prefixes | None:
    """How the names of two models' layers differ, if by a prefix only and if all else is equal; None otherwise.

    Args:
        here: Layer name -> shape.
        there: Layer name -> shape, in any order.

    Example:
        >>> shape = LayerShape("layers.0.mlp.gate.weight", 8, {"down_proj": (64, 128)})
        >>> other = LayerShape("model.layers.0.mlp.gate.weight", 8, {"down_proj": (64, 128)})
        >>> prefixes_of({"layers.0.mlp": shape}, {"model.layers.0.mlp": other})
        Prefixes(here='', there='model.')
    """
    if len(here) != len(there) or not here:
        return None
    first, other = min(here).split("."), min(there).split(".")  # the same layer: a prefix leaves the order as it is
    common = 0
    while common < min(len(first), len(other)) and first[-1 - common] == other[-1 - common]:
        common += 1
    before = first[: len(first) - common], other[: len(other) - common]
    numbered = any(part.isdigit() for parts in before for part in parts)  # other layers of the same model
    if numbered or common == 0 or first[-common].isdigit():
        return None
    found = Prefixes(*("".join(f"{part}." for part in parts) for parts in before))
    if not all(name.startswith(found.here) and shape.router.startswith(found.here) for name, shape in here.items()):
        return None
    return found if found.shapes(here) == there else None
