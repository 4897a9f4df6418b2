"""The optimizer's own knowledge of where experts are sensitive: means of Adam's second moment, by row and by column.

An adaptive optimizer holds a running mean of squared gradients for every weight, an estimate of the diagonal of the
empirical Fisher matrix. Its means over the rows and over the columns of each expert matrix are all that allocation
and quantization need, a few vectors an expert, so that both can run later and elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .files import replaced_when_done
from .module_tree import Weight
from .moe_layers import LayerShape, MoELayer

_FORMAT = "moe-precision-curvature"
_VERSION = 1


class CurvatureError(ValueError):
    """No second moment to read, a damaged file, or curvature of another model."""


@dataclass
class Curvature:
    """Row and column means of the second moment of every expert matrix.

    Attributes:
        layers: Layer name -> `LayerShape`, in module order.
        rows: Layer name -> projection name -> ``(E, out)`` float32.
        columns: Layer name -> projection name -> ``(E, in)`` float32.
    """

    layers: dict[str, LayerShape]
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def fit_weights(self, layer: str, projection: str, expert: int) -> Tensor:
        """Weights of a matrix's input columns in the quantizer's fit, ``(in,)``: column means, damped by their mean."""
        columns = self.columns[layer][projection][expert]
        return columns + columns.mean()

    def check_layers(self, found: dict[str, LayerShape]) -> None:
        """Raises `CurvatureError` if it is of another model."""
        if self.layers != found:
            raise CurvatureError(
                f"the curvature is of another model: it has layers {list(self.layers)}, expected {list(found)}, or "
                "their shapes differ"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes safetensors: ``rows/<layer>/<projection>`` and ``columns/<layer>/<projection>``."""
        tensors: dict[str, Tensor] = {}
        for kind, means in (("rows", self.rows), ("columns", self.columns)):
            for layer, of_layer in means.items():
                tensors |= {f"{kind}/{layer}/{name}": values.contiguous() for name, values in of_layer.items()}
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "layers": json.dumps(layers)}
        with replaced_when_done(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Curvature:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            CurvatureError: The file is truncated, or is no curvature.
        """
        name = repr(os.fspath(path))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no curvature at {name}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
                    raise CurvatureError(f"{name} is no {_FORMAT} of version {_VERSION}; its metadata: {metadata}")
                layers = {n: LayerShape.from_dict(d) for n, d in json.loads(metadata["layers"]).items()}
                rows, columns = (
                    {
                        n: {p: file.get_tensor(f"{kind}/{n}/{p}") for p in layer.projections}
                        for n, layer in layers.items()
                    }
                    for kind in ("rows", "columns")
                )
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise CurvatureError(f"{name} is no whole curvature file: {error}") from error
        return cls(layers, rows, columns)


def as_curvature(curvature: Curvature | str | os.PathLike) -> Curvature:
    """Takes curvature or the path of its file."""
    return curvature if isinstance(curvature, Curvature) else Curvature.load(curvature)


def curvature_of(layers: list[MoELayer], optimizers: Iterable[Any]) -> Curvature:
    """Reads the second moments of all expert weights from Adam-like optimizers; a collective under FSDP2.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Optimizers that have taken a step; Lightning's or accelerate's wrappers are looked through.

    Raises:
        CurvatureError: An expert weight has no second moment in any of them: another kind of optimizer, frozen experts,
            state in 8 bits, or a flat shard (FSDP1, DeepSpeed).
    """
    moments = _second_moments(optimizers)
    curvature = Curvature({layer.name: layer.shape for layer in layers})
    for layer in layers:
        curvature.rows[layer.name], curvature.columns[layer.name] = {}, {}
        for name, bank in layer.banks.items():
            rows, columns = zip(*(_means(weight, moments) for weight in bank.weights), strict=True)
            if len(bank.weights) > 1:
                by_row, by_column = torch.stack(rows), torch.stack(columns)
            elif rows[0].ndim == 1:  # a flat bank has means of its rows alone
                raise CurvatureError(f"curvature of flat banks ({bank.weights[0].name!r}) cannot be read yet")
            else:
                by_row, by_column = rows[0][: layer.num_experts], columns[0][: layer.num_experts]
            if bank.transposed:
                by_row, by_column = by_column, by_row
            curvature.rows[layer.name][name], curvature.columns[layer.name][name] = by_row, by_column
    return curvature


def _second_moments(optimizers: Iterable[Any]) -> dict[int, tuple[Any, float]]:
    """Parameter id -> (second moment, what divides it for bias correction)."""
    found: dict[int, tuple[Any, float]] = {}
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            beta = group.get("betas", (0.0, 0.0))[1]
            for parameter in group["params"]:
                state = inner.state.get(parameter, {})
                if "exp_avg_sq" in state:
                    step = float(state.get("step", 0))
                    found[id(parameter)] = (state["exp_avg_sq"], 1 - beta**step if step else 1.0)
    return found


def _means(weight: Weight, moments: dict[int, tuple[Any, float]]) -> tuple[Tensor, Tensor]:
    """Means over the last and over the last but one dimension, float32 on the CPU."""
    parameter = weight.parameter()
    moment, correction = moments.get(id(parameter), (None, 1.0))
    if moment is None or tuple(moment.shape) != weight.shape or not moment.is_floating_point():
        raise CurvatureError(
            f"the optimizer has no second moment of shape {weight.shape} for {weight.name!r}: curvature is read from "
            "Adam and AdamW whose state is whole and of floats. Are the experts frozen, the optimizer another one, its "
            "state in 8 bits, or flat shards (FSDP1, DeepSpeed)?"
        )
    means = [moment.mean(dim=dimension, dtype=torch.float32) / correction for dimension in (-1, -2)]
    whole = [mean.full_tensor() if isinstance(mean, DTensor) else mean for mean in means]
    return whole[0].cpu(), whole[1].cpu()
