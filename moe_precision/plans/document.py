"""The plan's JSON document: its schema, the rules that a schema cannot express, and how it is read and written.

docs/plan-format.md is the specification, plan.schema.json the schema.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from importlib.resources import files
from typing import Any, NoReturn, cast

import jsonschema

from ..files import replaced_when_done
from .dropping import check_dropped
from .widths import DROPPED, PlanError, check_group_size

FORMAT = "moe-precision-plan"
FORMAT_VERSION = 2
DROPPING_VERSION = 3  # of a plan with 0 bits among its levels or widths, which earlier readers must refuse

Document = dict[str, Any]


@cache
def schema() -> Document:
    """The published JSON Schema of the plan's format."""
    text = files("moe_precision.plans").joinpath("plan.schema.json").read_text(encoding="utf-8")
    return cast(Document, json.loads(text))


def write(document: Document, path: str | os.PathLike[str]) -> None:
    """Writes a document; an existing file is replaced in one step, never in part."""
    text = _pretty(document)
    with replaced_when_done(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file in which every number is finite.

    Raises:
        FileNotFoundError: No such file.
        PlanError: The file is truncated, or holds NaN or an infinity.
    """
    name = repr(os.fspath(path))

    def refuse(constant: str) -> NoReturn:
        raise PlanError(f"{name} holds {constant}; every number in a plan must be finite")

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{name} is not a complete JSON file (truncated?): {error}") from error


def validate(data: Any, source: str) -> None:
    """Raises `PlanError` naming what breaks a rule of docs/plan-format.md, where, and in which file."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PlanError(f'{source} is not a precision plan: expected "format": {FORMAT!r}, got {found!r}')
    if data.get("format_version") not in (FORMAT_VERSION, DROPPING_VERSION):
        raise PlanError(
            f"{source} has format_version {data.get('format_version')!r}, this release reads {FORMAT_VERSION} and "
            f"{DROPPING_VERSION}; use the release that made it, or make the plan again from its history"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(data))
    if error is not None:
        raise PlanError(f"{source} is not valid at {error.json_path}: {error.message}")
    given = [
        key for key in ("average_bits", "stored_bits", "expert_gib", "total_gib") if key in (data["settings"] or {})
    ]
    if len(given) > 1:
        raise PlanError(f"{source} states {' and '.join(given)} in its settings, which are {len(given)} budgets")
    for name, layer in data["layers"].items():
        _check_layer(name, layer, data["group_size"], source)
    if data["format_version"] != version_of(data["layers"], data["settings"]):
        raise PlanError(
            f"{source} states format_version {data['format_version']}, but 0 bits, which drop an expert, make it "
            f"{version_of(data['layers'], data['settings'])}; change plans with PrecisionPlan.with_bits"
        )


def version_of(layers: Document, settings: Document | None) -> int:
    """The format version of a plan with these layers and settings, as its file holds them."""
    widths = {bits for layer in layers.values() for matrix in layer["projections"].values() for bits in matrix["bits"]}
    return DROPPING_VERSION if DROPPED in widths | set((settings or {}).get("bits", ())) else FORMAT_VERSION


def _check_layer(name: str, layer: Document, group_size: int, source: str) -> None:
    experts = layer["num_experts"]
    lists = {f"bits of {p}": v["bits"] for p, v in layer["projections"].items()}
    if "order" in layer:
        lists["order"] = layer["order"]
    lists |= layer.get("router_norms", {}) | layer.get("signals", {})
    for projection, by_width in layer.get("costs", {}).items():
        if projection not in layer["projections"]:
            raise PlanError(f"{source}: layer {name!r} has costs of {projection!r}, which is not one of its matrices")
        lists |= {f"costs of {projection} at {bits} bits": values for bits, values in by_width.items()}
    for key, values in lists.items():
        if len(values) != experts:
            raise PlanError(f"{source}: layer {name!r} has {experts} experts but {len(values)} values of {key}")
        if not all(math.isfinite(value) for value in values):
            raise PlanError(f"{source}: layer {name!r} has a value of {key} that is not finite")
    if "order" in layer and sorted(layer["order"]) != list(range(experts)):
        raise PlanError(f"{source}: the order of layer {name!r} does not name each of its {experts} experts once")
    try:
        check_dropped(name, {p: v["bits"] for p, v in layer["projections"].items()}, layer.get("top_k"))
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error
    if any(DROPPED < bits < 16 for v in layer["projections"].values() for bits in v["bits"]):
        check_group_size(group_size, name, {p: tuple(v["shape"]) for p, v in layer["projections"].items()})


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with a list of numbers, or of strings, on one line."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(str(key))}: {_pretty(one, inner)}" for key, one in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | list | tuple) for one in value):
        return "[\n" + ",\n".join(inner + _pretty(one, inner) for one in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
