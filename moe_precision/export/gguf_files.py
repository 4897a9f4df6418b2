"""Reads the bits of every expert out of a GGUF file, by the types of its tensors; no weight is read.

llama.cpp keeps one matrix of all experts of a layer in one tensor of one type. Its files of early 2024 and before have
a tensor for each expert; they are read too.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.headers import CheckpointError
from ..layers.shape import LayerShape
from ..plans.layer_plan import LayerPlan
from ..plans.notes import PlanNotes
from ..plans.plan import PrecisionPlan
from .names import gguf_tensor, places

METHOD = "gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_BANK = re.compile(r"blk\.(\d+)\.(ffn_(?:gate|up|gate_up|down)_exps)\.weight")
_SINGLE = re.compile(r"blk\.(\d+)\.(ffn_(?:gate|up|down))\.(\d+)\.weight")
_OF_AN_EXPERT = re.compile(r"blk\.\d+\.ffn_(?:gate|up|gate_up|down)(?:_exps|\.\d+)\.")
_ORDER = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps")  # of the forward pass
_FLOAT = ("F64", "F32", "F16", "BF16")
_QUANTIZED = re.compile(r"(?:I?Q|TQ|MXFP|NVFP)([1-8])")  # the digit in a type's name is its nominal bits


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its type's name, its dimensions as they are there (the row's length first), its bytes."""

    type: str
    dimensions: tuple[int, ...]
    nbytes: int
    block: int


@dataclass(frozen=True)
class _Matrix:
    """One matrix of every expert: ``(out, in)``, and its nominal bits by expert."""

    shape: tuple[int, int]
    bits: list[int]


@dataclass(frozen=True)
class GGUFExperts:
    """The experts of a GGUF file.

    Attributes:
        name: The file's name, without the number of a part.
        architecture: llama.cpp's name for the model's family.
        layers: Number of the block -> GGUF's name of a matrix, without ``.weight`` -> the matrix.
        types: llama.cpp's type -> its share of the expert weights.
        stored_bits: Bits that an expert weight takes in the file, scales and offsets included.
        blocks: Weights in a block of each type, all that occur.
    """

    name: str
    architecture: str
    layers: dict[int, dict[str, _Matrix]]
    types: dict[str, float]
    stored_bits: float
    blocks: list[int]

    def plan(self) -> PrecisionPlan:
        """The widths as a plan in the file's own names: layer ``blk.0``, matrix ``ffn_gate_exps``."""
        layers = {}
        for number, matrices in self.layers.items():
            shapes = {name: matrix.shape for name, matrix in matrices.items()}
            experts = len(next(iter(matrices.values())).bits)
            shape = LayerShape(f"blk.{number}.ffn_gate_inp", experts, shapes)
            layers[f"blk.{number}"] = LayerPlan(shape, {name: matrix.bits for name, matrix in matrices.items()})
        return self._as_plan(self.architecture, layers)

    def plan_like(self, other: PrecisionPlan) -> PrecisionPlan:
        """The widths in the names of another plan, for a comparison; layers that it lacks keep the file's names.

        Raises:
            CheckpointError: The file lacks a layer of that plan, or its experts have other shapes.
            ExportError: Layers of the plan whose names in GGUF are not known.
        """
        layers: dict[str, LayerPlan] = {}
        used: set[int] = set()
        for name, layer in other.layers.items():
            widths: dict[str, list[int]] = {}
            for place in places(name, layer.shape, other.model_type):
                block, _, tensor = gguf_tensor(place).removeprefix("blk.").partition(".")
                matrices = self.layers.get(int(block), {})
                joined = "ffn_gate_up_exps" if place.part in ("gate_proj", "up_proj") else tensor
                matrix = matrices.get(tensor) or matrices.get(joined)
                if matrix is None:
                    raise CheckpointError(
                        f"{self.name!r} has no 'blk.{block}.{tensor}.weight', layer {name!r} of the plan"
                    )
                used.add(int(block))
                out, inp = layer.shape.projections[place.projection]
                if place.part != place.projection and tensor in matrices:
                    out //= 2  # joined in the plan alone
                elif place.part == place.projection and tensor not in matrices:
                    out *= 2  # joined in the file alone
                expected = (out, inp)
                if (matrix.shape, len(matrix.bits)) != (expected, layer.shape.num_experts):
                    raise CheckpointError(
                        f"{self.name!r} is of another model than the plan: 'blk.{block}.{tensor}.weight' has "
                        f"{len(matrix.bits)} experts of {matrix.shape}, layer {name!r} of the plan "
                        f"{layer.shape.num_experts} of {expected}"
                    )
                if widths.setdefault(place.projection, matrix.bits) != matrix.bits:
                    raise CheckpointError(
                        f"{self.name!r}: gate and up of block {block} have different bits, and the plan has one width "
                        "for both"
                    )
            layers[name] = LayerPlan(layer.shape, widths)
        own = self.plan().layers
        layers |= {f"blk.{block}": own[f"blk.{block}"] for block in self.layers if block not in used}
        return self._as_plan(other.model_type, layers)

    def _as_plan(self, model_type: str, layers: dict[str, LayerPlan]) -> PrecisionPlan:
        notes: PlanNotes = {"read_from": self.name, "group_sizes": self.blocks}
        return PrecisionPlan(model_type, layers, min(self.blocks), METHOD, notes=notes)


def read_gguf(path: str | os.PathLike[str]) -> GGUFExperts:
    """The experts of a GGUF file; of one that is split, all its parts, which have to be beside it.

    Args:
        path: The file, or any part of it.

    Raises:
        CheckpointError: The ``gguf`` package or a part is missing; a file is damaged, of a dense model, or float; an
            expert is missing, or has a type whose bits are not known.
    """
    tensors, architecture, kind, count = _tensors_of(Path(path))
    name = repr(os.fspath(path))
    banks: dict[tuple[int, str], dict[int, _Tensor]] = {}
    for tensor_name, tensor in tensors.items():
        if found := _BANK.fullmatch(tensor_name):
            if len(tensor.dimensions) != 3 or 0 in tensor.dimensions:
                raise CheckpointError(f"{name}: {tensor_name!r} is {tensor.dimensions}, expected (in, out, experts)")
            for expert in range(tensor.dimensions[2]):
                banks.setdefault((int(found[1]), found[2]), {})[expert] = tensor
        elif found := _SINGLE.fullmatch(tensor_name):
            banks.setdefault((int(found[1]), f"{found[2]}_exps"), {})[int(found[3])] = tensor
        elif tensor_name.endswith("_exps.weight") and len(tensor.dimensions) == 3:
            raise CheckpointError(f"{name} holds experts as {tensor_name!r}, a name that is not known")
    if not banks:
        raise CheckpointError(
            f"{name} holds no experts: it is of a dense model, or no model ({kind} of architecture {architecture!r})"
        )
    layers: dict[int, dict[str, _Matrix]] = {}
    for (block, matrix), experts in sorted(banks.items(), key=lambda one: (one[0][0], _ORDER.index(one[0][1]))):
        layers.setdefault(block, {})[matrix] = _matrix(f"{name}: 'blk.{block}.{matrix}'", experts, count)
    for block, matrices in layers.items():
        names = set(matrices)
        if "ffn_down_exps" not in names or not names & {"ffn_up_exps", "ffn_gate_up_exps"}:
            raise CheckpointError(
                f"{name} has only {sorted(names)} of the experts of block {block}, which lacks a matrix"
            )
    types: Counter[str] = Counter()
    blocks = set()
    for experts in banks.values():
        for tensor in experts.values():
            types[tensor.type.lower()] += math.prod(tensor.dimensions[:2])
            blocks |= set() if tensor.type in _FLOAT else {tensor.block}
    if not blocks:
        raise CheckpointError(f"{name} is float: its experts are {', '.join(types)}, with no bits to show")
    in_bytes = sum(tensor.nbytes for tensor_name, tensor in tensors.items() if _OF_AN_EXPERT.match(tensor_name))
    shares = {kind: weights / types.total() for kind, weights in types.most_common()}
    stem = part[1] + ".gguf" if (part := _PART.fullmatch(Path(path).name)) else Path(path).name
    return GGUFExperts(stem, architecture, layers, shares, 8 * in_bytes / types.total(), sorted(blocks))


def _matrix(name: str, experts: dict[int, _Tensor], count: int | None) -> _Matrix:
    """One matrix of all experts of a layer."""
    expected = len(experts) if count is None else count
    if sorted(experts) != list(range(expected)):
        raise CheckpointError(f"{name} has the experts {sorted(experts)}, expected {expected} of them from 0 on")
    shapes = {tensor.dimensions[:2] for tensor in experts.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise CheckpointError(f"{name}: its experts have the shapes {sorted(shapes)}, expected one of two dimensions")
    ((inp, out),) = shapes
    return _Matrix((out, inp), [_bits(name, experts[expert].type) for expert in range(expected)])


def _bits(name: str, kind: str) -> int:
    if kind in _FLOAT:
        return 16
    if (found := _QUANTIZED.match(kind)) is None:
        raise CheckpointError(f"{name} is of the type {kind!r}, whose bits are not known")
    return int(found[1])


def _tensors_of(path: Path) -> tuple[dict[str, _Tensor], str, str, int | None]:
    """All tensors of a file and its other parts, the architecture, the kind of file, and the number of experts."""
    named = _PART.fullmatch(path.name)
    parts = int(named[3]) if named else 1
    files = [path.with_name(f"{named[1]}-{n:05}-of-{named[3]}.gguf") for n in range(1, parts + 1)] if named else [path]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} is one of {parts} parts, and {len(missing)} are not beside it: {', '.join(missing[:3])}; "
            "copy them there"
        )
    tensors: dict[str, _Tensor] = {}
    fields: dict[str, Any] = {}
    for number, file in enumerate(files):
        fields_of_part, found = _read(file)
        split = fields_of_part.get("split.no", 0), fields_of_part.get("split.count", 1)
        if split[1] > 1 and split != (number, parts):
            raise CheckpointError(
                f"{str(file)!r} is part {split[0] + 1} of {split[1]} by what it holds; give it the name that "
                f"llama.cpp gave it (NAME-{split[0] + 1:05}-of-{split[1]:05}.gguf), with the other parts beside it"
            )
        fields = {**fields_of_part, **fields}  # the first part has all of them
        tensors |= found
    if fields.get("split.tensors.count", len(tensors)) != len(tensors):
        raise CheckpointError(
            f"{str(path)!r} and its other parts hold {len(tensors)} tensors, expected "
            f"{fields['split.tensors.count']}; copy them again"
        )
    architecture = str(fields.get("general.architecture", "unknown"))
    kind = str(fields.get("general.type", "model"))
    return tensors, architecture, kind, fields.get(f"{architecture}.expert_count")


def _read(file: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The fields that have one value, and the tensors of one file."""
    try:
        from gguf import GGML_QUANT_SIZES, GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{str(file)!r}: GGUF files are read by the gguf package: pip install 'moe-precision[gguf]'"
        ) from error
    try:
        reader = GGUFReader(file)
        plain = {name: field for name, field in reader.fields.items() if field.types and field.types[0].name != "ARRAY"}
        fields = {name: field.contents() for name, field in plain.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{str(file)!r} is truncated or damaged, or newer than the installed gguf package: {error}; copy it again, "
            "or pip install -U gguf"
        ) from error
    tensors = {
        one.name: _Tensor(
            one.tensor_type.name,
            tuple(int(size) for size in one.shape),
            one.n_bytes,
            GGML_QUANT_SIZES[one.tensor_type][0],
        )
        for one in reader.tensors
    }
    return fields, tensors
