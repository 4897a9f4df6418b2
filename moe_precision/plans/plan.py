"""The precision plan: which width each expert gets, and why. Read, write, validate and compare it.

The file is versioned JSON that people read; docs/plan-format.md is its specification, plan.schema.json its schema.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema
from torch import nn

from ..errors import MoEPrecisionError
from ..files import replaced_when_done
from ..layers.moe_layers import LayerShape, find_moe_layers
from ..version import __version__

FORMAT = "moe-precision-plan"
FORMAT_VERSION = 1
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)  # 16: the expert is left as it is
SCALE_AND_OFFSET_BITS = 18  # of a group: quantize/scales.py


class PlanError(MoEPrecisionError, ValueError):
    """A plan that is damaged, impossible, or made for another model."""


def check_widths(widths: Iterable[int]) -> None:
    """Raises `PlanError` for a width that is not 1 to 8 or 16."""
    wrong = sorted({width for width in widths if width not in WIDTHS})
    if wrong:
        raise PlanError(f"bits must be 1 to 8, or 16 for an expert that is left alone; got {wrong}")


def check_group_size(group_size: int, layer: str, projections: dict[str, tuple[int, int]]) -> None:
    """Raises `PlanError` for a group size that is no multiple of 8 or does not divide a matrix's input width."""
    if group_size < 8 or group_size % 8:
        raise PlanError(f"group_size={group_size} is not a positive multiple of 8; use 32, 64 or 128")
    for name, (_, width) in projections.items():
        if width % group_size:
            fitting = [size for size in (128, 64, 32) if width % size == 0]
            advice = f"use {' or '.join(map(str, fitting))}" if fitting else "no group size of 32, 64 or 128 fits"
            raise PlanError(
                f"group_size={group_size} does not divide the input width {width} of {name!r} in layer {layer!r}; "
                f"{advice}"
            )


def stored_bits_per_weight(bits: int, group_size: int) -> float:
    """Bits a weight takes in the file: its code, and its share of the group's scale and offset."""
    if group_size < 8:
        raise PlanError(f"group_size={group_size} is not a positive multiple of 8; use 32, 64 or 128")
    return float(bits) if bits == 16 else bits + SCALE_AND_OFFSET_BITS / group_size


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    libraries = ("torch", "transformers", "pytorch-lightning")
    return (("moe-precision", __version__), *((name, importlib.metadata.version(name)) for name in libraries))


def model_type_of(model: nn.Module) -> str:
    """transformers' ``config.model_type`` where there is one, else the name of the class."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)


@dataclass(frozen=True)
class LayerPlan:
    """The widths of one layer's experts.

    Attributes:
        shape: The layer's router, number of experts and matrix shapes.
        projection_bits: Projection name -> bits, indexed by expert.
        order: Expert indices, most bits first; empty where the method has no order.
        router_norms: ``first`` (absent without a baseline) and ``last`` norm of each expert.
        signals: Every signal that the method read, by name, indexed by expert.
    """

    shape: LayerShape
    projection_bits: dict[str, list[int]]
    order: list[int] = field(default_factory=list)
    router_norms: dict[str, list[float]] = field(default_factory=dict)
    signals: dict[str, list[float]] = field(default_factory=dict)

    @property
    def bits(self) -> list[int]:
        """Bits of each expert.

        Raises:
            PlanError: An expert's projections have different widths; read `projection_bits` then.
        """
        first, *others = self.projection_bits.values()
        if any(other != first for other in others):
            raise PlanError("projections of one expert have different bits here: read .projection_bits")
        return list(first)


@dataclass(frozen=True)
class PrecisionPlan:
    """Bit-widths for every expert of a model.

    Attributes:
        model_type: transformers' ``config.model_type``, or the class name of a model without a config.
        layers: Layer name -> `LayerPlan`, in module order.
        group_size: Weights along the input dimension that share a scale and an offset.
        asked_average_bits: The budget; `average_bits` is what the plan reaches.
        method: Name of the allocator.
        settings: The allocator's settings.
        baseline_step: Optimizer step at which the first norms were taken, None if there is no baseline.
        last_step: Optimizer step of the last norms.
        created_by: Versions that made the plan.
    """

    model_type: str
    layers: dict[str, LayerPlan]
    group_size: int
    asked_average_bits: float
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    baseline_step: int | None = None
    last_step: int | None = None
    created_by: dict[str, str] = field(default_factory=lambda: dict(_versions()))

    @property
    def granularity(self) -> str:
        """The coarsest of ``layer``, ``layer+projection``, ``expert`` and ``expert+projection`` that fits the bits."""
        banks = [list(layer.projection_bits.values()) for layer in self.layers.values()]
        one_expert = all(len(set(widths)) == 1 for bank in banks for widths in bank)  # experts alike
        one_width = all(widths == bank[0] for bank in banks for widths in bank)  # projections alike
        return ("layer" if one_expert else "expert") + ("" if one_width else "+projection")

    @property
    def average_bits(self) -> float:
        """Nominal bits a routed expert's weight takes, on average."""
        return self._mean(float)

    @property
    def stored_bits(self) -> float:
        """Bits a routed expert's weight takes in the file, scales and offsets included, on average."""
        return self._mean(lambda bits: stored_bits_per_weight(bits, self.group_size))

    def _mean(self, cost: Any) -> float:
        total, weights = 0.0, 0
        for layer in self.layers.values():
            for name, widths in layer.projection_bits.items():
                out, inp = layer.shape.projections[name]
                total += out * inp * sum(cost(bits) for bits in widths)
                weights += out * inp * len(widths)
        return total / weights

    @property
    def patterns(self) -> dict[str, Any]:
        """``router_pattern`` and ``expert_pattern`` that the layers were found with, for `find_moe_layers`."""
        return {key: self.settings[key] for key in ("router_pattern", "expert_pattern") if key in self.settings}

    def without_signals(self) -> PrecisionPlan:
        """The widths alone: what a quantized model's config.json has to hold."""
        return replace(self, layers={n: LayerPlan(p.shape, p.projection_bits) for n, p in self.layers.items()})

    def check(self, model: nn.Module) -> None:
        """Checks that the plan was made for this model.

        Raises:
            PlanError: Another model type, a layer that is missing on either side, or another shape.
            MoELayerError: The model has no Mixture-of-Experts layer.
        """
        found = {layer.name: layer.shape for layer in find_moe_layers(model, **self.patterns)}
        self.check_layers(found, model_type_of(model))

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
        """One line for each expert matrix whose bits differ, and for each layer that only one of the plans has."""
        lines = []
        for name in self.layers.keys() | other.layers.keys():
            mine, theirs = self.layers.get(name), other.layers.get(name)
            if mine is None or theirs is None:
                lines.append(f"{name}: only in the {'other' if mine is None else 'first'} plan")
                continue
            for projection, widths in mine.projection_bits.items():
                others = theirs.projection_bits.get(projection, [])
                if len(others) != len(widths):
                    lines.append(f"{name} {projection}: {len(widths)} experts, {len(others)} in the other plan")
                    continue
                pairs = enumerate(zip(widths, others, strict=True))
                lines += [f"{name} expert {e} {projection}: {a} -> {b} bits" for e, (a, b) in pairs if a != b]
        return sorted(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as the file holds it."""
        layers = {}
        for name, layer in self.layers.items():
            shapes = layer.shape.projections
            entry: dict[str, Any] = {
                "router": layer.shape.router,
                "num_experts": layer.shape.num_experts,
                "projections": {p: {"shape": list(shapes[p]), "bits": b} for p, b in layer.projection_bits.items()},
            }
            optional: dict[str, Any] = {"experts": layer.shape.experts, "order": layer.order}
            optional |= {"router_norms": layer.router_norms, "signals": layer.signals}
            layers[name] = entry | {key: value for key, value in optional.items() if value}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_by": self.created_by,
            "model_type": self.model_type,
            "method": self.method,
            "settings": self.settings,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "average_bits": {"asked": self.asked_average_bits, "achieved": round(self.average_bits, 6)},
            "stored_bits": round(self.stored_bits, 6),
            "baseline": "none" if self.baseline_step is None else {"step": self.baseline_step},
            "last_step": self.last_step,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "the plan") -> PrecisionPlan:
        """Validates and reads what `to_dict` returned.

        Raises:
            PlanError: With what is wrong, where, and in which file.
        """
        _validate(data, source)
        layers = {}
        for name, entry in data["layers"].items():
            projections = entry["projections"]
            shapes = {p: (int(v["shape"][0]), int(v["shape"][1])) for p, v in projections.items()}
            layers[name] = LayerPlan(
                shape=LayerShape(entry["router"], int(entry["num_experts"]), shapes, entry.get("experts", "")),
                projection_bits={p: [int(bits) for bits in v["bits"]] for p, v in projections.items()},
                order=list(entry.get("order", [])),
                router_norms=dict(entry.get("router_norms", {})),
                signals=dict(entry.get("signals", {})),
            )
        plan = cls(
            model_type=data["model_type"],
            layers=layers,
            group_size=int(data["group_size"]),
            asked_average_bits=data["average_bits"]["asked"],
            method=data["method"],
            settings=dict(data["settings"]),
            baseline_step=None if data["baseline"] == "none" else data["baseline"]["step"],
            last_step=data["last_step"],
            created_by=dict(data["created_by"]),
        )
        if data["granularity"] != plan.granularity:
            raise PlanError(f"{source} states granularity {data['granularity']!r}, its bits are {plan.granularity!r}")
        stated_bits = data["average_bits"]["achieved"], data["stored_bits"]
        for stated, true in zip(stated_bits, (plan.average_bits, plan.stored_bits), strict=True):
            if abs(stated - true) > 1e-4:
                raise PlanError(
                    f"{source} states {stated} bits on average, but its experts' bits give {true:.6f}; was it edited, "
                    "or made by an earlier release? `moe-precision plan` makes it again"
                )
        return plan

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan; an existing file is replaced in one step, never half."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        with replaced_when_done(path) as temporary:
            temporary.write_text(_numbers_on_one_line(text) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrecisionPlan:
        """Reads and validates a plan.

        Raises:
            FileNotFoundError: No such file.
            PlanError: The file is truncated, of an unknown version, or breaks a rule of docs/plan-format.md.
        """
        name = repr(os.fspath(path))

        def refuse(constant: str) -> None:
            raise PlanError(f"{name} holds {constant}; every number in a plan must be finite")

        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file, parse_constant=refuse)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{name} is no whole JSON file (truncated?): {error}") from error
        return cls.from_dict(data, name)


def as_plan(plan: PrecisionPlan | dict | str | os.PathLike) -> PrecisionPlan:
    """Takes a plan, its dict, or the path of its file."""
    if isinstance(plan, PrecisionPlan):
        return plan
    return PrecisionPlan.from_dict(plan) if isinstance(plan, dict) else PrecisionPlan.load(plan)


@cache
def schema() -> dict[str, Any]:
    """The published JSON Schema of the plan's format."""
    return json.loads(files("moe_precision.plans").joinpath("plan.schema.json").read_text(encoding="utf-8"))


def _validate(data: Any, source: str) -> None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f'{source} is no precision plan: expected an object with "format": "{FORMAT}"')
    if data.get("format_version") != FORMAT_VERSION:
        raise PlanError(
            f"{source} has format_version {data.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
            "use the release that made it, or make the plan again from its history"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(data))
    if error is not None:
        raise PlanError(f"{source} is not valid at {error.json_path}: {error.message}")
    for name, layer in data["layers"].items():
        experts = layer["num_experts"]
        lists = {f"bits of {p}": v["bits"] for p, v in layer["projections"].items()}
        if "order" in layer:
            lists["order"] = layer["order"]
        lists |= layer.get("router_norms", {}) | layer.get("signals", {})
        for key, values in lists.items():
            if len(values) != experts:
                raise PlanError(f"{source}: layer {name!r} has {experts} experts but {len(values)} values of {key}")
            if not all(math.isfinite(value) for value in values):
                raise PlanError(f"{source}: layer {name!r} has a value of {key} that is not finite")
        if "order" in layer and sorted(layer["order"]) != list(range(experts)):
            raise PlanError(f"{source}: the order of layer {name!r} does not name each of its {experts} experts once")
        if any(bits != 16 for v in layer["projections"].values() for bits in v["bits"]):
            check_group_size(data["group_size"], name, {p: tuple(v["shape"]) for p, v in layer["projections"].items()})


def _numbers_on_one_line(text: str) -> str:
    return re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
