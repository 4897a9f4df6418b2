"""The precision plan: which width each expert gets, and why. A value, and the file that holds it."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from ..layers.naming import Patterns
from ..layers.prefixes import prefixes_of
from ..layers.shape import LayerShape
from ..version import __version__
from . import document
from .difference import differences
from .dropping import check_dropped
from .layer_plan import LayerPlan
from .model_types import may_have_the_same_layers
from .model_types import model_type_of as model_type_of
from .notes import PlanNotes
from .numbers import whole_number
from .settings import PlanSettings
from .widths import Granularity, PlanError, check_widths, stored_bits_per_weight

if TYPE_CHECKING:
    from torch import nn

Bits = Mapping[str, Sequence[int] | Mapping[str, Sequence[int]]]  # layer -> widths, or projection -> widths


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    libraries = ("torch", "transformers", "pytorch-lightning")
    return (("moe-precision", __version__), *((name, importlib.metadata.version(name)) for name in libraries))


@dataclass(frozen=True)
class PrecisionPlan:
    """Bit-widths for every expert of a model.

    Attributes:
        model_type: transformers' ``config.model_type``, or the class name of a model without a config.
        layers: Layer name -> `LayerPlan`, in module order.
        group_size: Weights along the input dimension that share a scale and an offset.
        method: Name of the allocation method, or of the tool whose checkpoint the widths were read from.
        settings: What was asked for; None for widths that no method here chose.
        notes: What was found while it was made.
        baseline_step: Optimizer step at which the first norms were taken, None if there is no baseline.
        last_step: Optimizer step of the last norms, None if it is not known.
        created_by: Versions that made the plan.

    Example:
        >>> plan = allocate(model, average_bits=2.5, bits=(2, 3), group_size=64)
        >>> plan.save("precision_plan.json")
        >>> PrecisionPlan.load("precision_plan.json").average_bits
        2.5
    """

    model_type: str
    layers: dict[str, LayerPlan]
    group_size: int
    method: str
    settings: PlanSettings | None = None
    notes: PlanNotes = field(default_factory=PlanNotes)
    baseline_step: int | None = None
    last_step: int | None = None
    created_by: dict[str, str] = field(default_factory=lambda: dict(_versions()))

    @property
    def granularity(self) -> Granularity:
        """The coarsest of ``layer``, ``layer+projection``, ``expert`` and ``expert+projection`` that fits the bits."""
        banks = [list(layer.projection_bits.values()) for layer in self.layers.values()]
        one_expert = all(len(set(widths)) == 1 for bank in banks for widths in bank)  # experts alike
        one_width = all(widths == bank[0] for bank in banks for widths in bank)  # projections alike
        return cast(Granularity, ("layer" if one_expert else "expert") + ("" if one_width else "+projection"))

    @property
    def average_bits(self) -> float:
        """Nominal bits per weight of the routed experts, on average."""
        return self._mean(float)

    @property
    def stored_bits(self) -> float:
        """Stored bits per weight of the routed experts, scales and offsets included, on average."""
        return self._mean(lambda bits: stored_bits_per_weight(bits, self.group_size))

    def _mean(self, cost: Callable[[int], float]) -> float:
        banks = [
            (math.prod(layer.shape.projections[name]), widths)
            for layer in self.layers.values()
            for name, widths in layer.projection_bits.items()
        ]
        weights = sum(size * len(widths) for size, widths in banks)
        return sum(size * sum(map(cost, widths)) for size, widths in banks) / weights

    @property
    def drops(self) -> bool:
        """Whether an expert of any layer is at 0 bits."""
        return any(layer.dropped for layer in self.layers.values())

    @property
    def patterns(self) -> Patterns:
        """``router_pattern`` and ``expert_pattern`` that the layers were found with, for `find_moe_layers`."""
        return Patterns() if self.settings is None else self.settings.patterns

    def widths_only(self) -> PrecisionPlan:
        """The plan without signals, costs and norms: what a quantized model's config.json has to hold."""
        return replace(
            self,
            layers={n: LayerPlan(p.shape, copy.deepcopy(p.projection_bits)) for n, p in self.layers.items()},
            notes=PlanNotes(),
        )

    def with_bits(self, bits: Bits) -> PrecisionPlan:
        """An edited plan: other widths for some layers, everything else as it is.

        Args:
            bits: Layer name -> one width per expert for all projections, or projection -> one width per expert. What is
                not named keeps its width.

        Returns:
            A new plan whose notes say that it was edited.

        Raises:
            PlanError: An unknown layer or projection, another number of experts, a width that is not 0 to 8 or 16, or
                experts that are dropped in part, or too many of them.

        Example:
            >>> plan = allocate(model, method="uniform", average_bits=2, group_size=64)
            >>> plan.with_bits({"model.layers.0.mlp": [4, 2, 2, 2, 2, 2, 2, 4]}).average_bits
            2.25
        """
        layers = copy.deepcopy(self.layers)  # so that editing one plan never changes another
        for name, given in bits.items():
            if name not in layers:
                raise PlanError(f"the plan has no layer {name!r}; it has {', '.join(layers)}")
            layer = layers[name]
            by_projection = given if isinstance(given, Mapping) else dict.fromkeys(layer.projection_bits, given)
            unknown = [projection for projection in by_projection if projection not in layer.projection_bits]
            if unknown:
                raise PlanError(f"layer {name!r} has no {unknown[0]!r}; it has {', '.join(layer.projection_bits)}")
            changed = {projection: _widths(name, projection, widths) for projection, widths in by_projection.items()}
            for projection, widths in changed.items():
                if len(widths) != layer.shape.num_experts:
                    raise PlanError(
                        f"layer {name!r} has {layer.shape.num_experts} experts, got {len(widths)} widths of "
                        f"{projection!r}"
                    )
                check_widths(widths)
            layers[name] = replace(layer, projection_bits=layer.projection_bits | changed)
            check_dropped(name, layers[name].projection_bits, layer.shape.top_k)
        return replace(self, layers=layers, notes=cast(PlanNotes, {**self.notes, "edited": True}))

    def check(self, model: nn.Module) -> None:
        """Checks that the plan was made for this model.

        Raises:
            PlanError: The model type differs, a layer is missing on either side, shapes differ, or fewer experts are
                left than serve a token.
            MoELayerError: The model has no Mixture-of-Experts layer.
        """
        from ..layers.moe_layers import find_moe_layers

        self.for_model(model, {layer.name: layer.shape for layer in find_moe_layers(model, **self.patterns)})

    def for_model(self, model: nn.Module, found: Mapping[str, LayerShape]) -> PrecisionPlan:
        """The plan in the names of this model: itself, or under another prefix in another class of the same model.

        ``AutoModel``, ``ForCausalLM`` and a model of text and images that holds the same text model can share a plan.

        Args:
            model: The model, on any device.
            found: Its layers by name, as found by `find_moe_layers` with the plan's patterns.

        Raises:
            PlanError: As in `check`.
        """
        change = prefixes_of({name: layer.shape for name, layer in self.layers.items()}, found)
        from ..layers.roots import root_model

        related = may_have_the_same_layers(root_model(model), self.model_type)
        own_type = model_type_of(root_model(model))
        if change is None or not related or (change.equal and self.model_type == own_type):
            self.check_layers(dict(found), self.model_type if related else own_type)
            layers = self.layers
        else:
            shapes = {name: change.shape(layer.shape) for name, layer in self.layers.items()}
            layers = {change(name): replace(layer, shape=shapes[name]) for name, layer in self.layers.items()}
        for name, layer in layers.items():  # the file may not state how many experts serve a token
            check_dropped(name, layer.projection_bits, found[name].top_k)
        return self if layers is self.layers else replace(self, layers=layers, model_type=own_type)

    def check_layers(self, found: dict[str, LayerShape], model_type: str) -> None:
        """`check` for layers that were found already."""
        if self.model_type != model_type:
            raise PlanError(f"the plan is for a model of type {self.model_type!r}, this model is {model_type!r}")
        missing, extra = [n for n in found if n not in self.layers], [n for n in self.layers if n not in found]
        if missing or extra:
            raise PlanError(
                f"the plan is for another model: of its layers the model lacks {extra or 'none'}, "
                f"of the model's layers the plan lacks {missing or 'none'}"
            )
        for name, shape in found.items():
            planned = self.layers[name].shape
            if planned != shape:
                raise PlanError(f"the plan is for another model: layer {name!r} is {shape}, the plan expects {planned}")

    def diff(self, other: PrecisionPlan) -> list[str]:
        """One line for each expert matrix whose bits differ, and for each layer that only one of the plans has.

        Layers that have another prefix in the other plan, which is for another class of the model, are the same.
        """
        return differences(self.layers, other.layers)

    def to_dict(self) -> document.Document:
        """The plan as the file holds it."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        settings = None if self.settings is None else self.settings.to_dict()
        found: document.Document = {
            "format": document.FORMAT,
            "format_version": document.version_of(layers, settings),
            "created_by": self.created_by,
            "model_type": self.model_type,
            "method": self.method,
            "settings": settings,
            "notes": dict(self.notes),
            "granularity": self.granularity,
            "group_size": self.group_size,
            "average_bits": round(self.average_bits, 6),
            "stored_bits": round(self.stored_bits, 6),
            "baseline": "none" if self.baseline_step is None else {"step": self.baseline_step},
            "last_step": self.last_step,
            "layers": layers,
        }
        return copy.deepcopy(found)

    @classmethod
    def from_dict(cls, data: Any, source: str = "the plan") -> PrecisionPlan:
        """Validates and reads what `to_dict` returned.

        Raises:
            PlanError: States what is wrong, where, and in which file.
        """
        document.validate(data, source)
        method, group_size, settings = data["method"], int(data["group_size"]), data["settings"]
        plan = cls(
            model_type=data["model_type"],
            layers={name: LayerPlan.from_dict(entry) for name, entry in data["layers"].items()},
            group_size=group_size,
            method=method,
            settings=None if settings is None else PlanSettings.recorded(settings, method, group_size),
            notes=copy.deepcopy(data["notes"]),
            baseline_step=None if data["baseline"] == "none" else data["baseline"]["step"],
            last_step=data["last_step"],
            created_by=dict(data["created_by"]),
        )
        if data["granularity"] != plan.granularity:
            raise PlanError(f"{source} states granularity {data['granularity']!r}, its bits are {plan.granularity!r}")
        for key, true in (("average_bits", plan.average_bits), ("stored_bits", plan.stored_bits)):
            if abs(data[key] - true) > 1e-4:
                raise PlanError(
                    f"{source} states {key} {data[key]}, but its experts' bits give {true:.6f}; was it edited by hand? "
                    "Change plans with PrecisionPlan.with_bits, or make the plan again with `moe-precision plan`"
                )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan; an existing file is replaced in one step, never in part."""
        document.write(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecisionPlan:
        """Reads and validates a plan.

        Raises:
            FileNotFoundError: No such file.
            PlanError: The file is truncated, of an unknown version, or breaks a rule of docs/plan-format.md.
        """
        return cls.from_dict(document.read(path), repr(os.fspath(path)))


def _widths(layer: str, projection: str, widths: Any) -> list[int]:
    if isinstance(widths, str) or not hasattr(widths, "__iter__"):
        raise PlanError(f"layer {layer!r}: expected one width per expert for {projection!r}, got {widths!r}")
    return [whole_number(f"bits of {projection}", bits) for bits in widths]


def as_plan(plan: PrecisionPlan | document.Document | str | os.PathLike[str]) -> PrecisionPlan:
    """Takes a plan, its dict, or the path of its file."""
    if isinstance(plan, PrecisionPlan):
        return plan
    if isinstance(plan, dict):
        return PrecisionPlan.from_dict(plan)
    if isinstance(plan, str | os.PathLike):
        return PrecisionPlan.load(plan)
    raise PlanError(f"expected a PrecisionPlan, its dict, or the path of its file, got {type(plan).__name__}")
