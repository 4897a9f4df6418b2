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
from torch import Tensor
from torch.distributed.tensor import DTensor

from .files import save_tensors
from .module_tree import Weight
from .moe_layers import LayerShape, MoELayer
from .router_norms import router_norms

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
        router_norms: Layer name -> ``(E,)`` float32 at the time, by which the weights it belongs to are known.
    """

    layers: dict[str, LayerShape]
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    router_norms: dict[str, Tensor] = field(default_factory=dict)

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

    def check_router_norms(self, norms: dict[str, Tensor]) -> None:
        """Raises `CurvatureError` if it is of other weights: router norms differ by more than another dtype does."""
        for name, expected in self.router_norms.items():
            found = norms[name].detach().float().cpu()
            if not torch.allclose(found, expected, rtol=2e-3, atol=0):
                raise CurvatureError(
                    f"the curvature is of other weights: in layer {name!r} router norms differ by up to "
                    f"{float(((found - expected).abs() / expected.clamp(min=1e-30)).max()):.2%}. Is it of another run?"
                )

    def _check_values(self) -> Curvature:
        for name, layer in self.layers.items():
            for projection, (out, inp) in layer.projections.items():
                for means, width in ((self.rows, out), (self.columns, inp)):
                    values = means[name][projection]
                    right = values.shape == (layer.num_experts, width) and values.is_floating_point()
                    if not right or not (values.isfinite() & (values >= 0)).all():
                        raise CurvatureError(
                            f"curvature of {projection!r} in layer {name!r}: expected finite means of at least 0 of "
                            f"shape ({layer.num_experts}, {width}), got {tuple(values.shape)}, {values.dtype}"
                        )
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Writes safetensors: ``rows/<layer>/<projection>``, ``columns/...`` alike, and ``router_norms/<layer>``.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = {f"router_norms/{name}": norms for name, norms in self.router_norms.items()}
        for kind, means in (("rows", self.rows), ("columns", self.columns)):
            for layer, of_layer in means.items():
                tensors |= {f"{kind}/{layer}/{name}": values for name, values in of_layer.items()}
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "layers": json.dumps(layers)}
        save_tensors(tensors, path, metadata)

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
                norms = {name: file.get_tensor(f"router_norms/{name}") for name in layers}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise CurvatureError(f"{name} is no whole curvature file: {error}") from error
        return cls(layers, rows, columns, norms)._check_values()


def as_curvature(curvature: Curvature | str | os.PathLike) -> Curvature:
    """Takes curvature or the path of its file."""
    return curvature if isinstance(curvature, Curvature) else Curvature.load(curvature)


def curvature_of(layers: list[MoELayer], optimizers: Iterable[Any]) -> Curvature:
    """Reads the second moments of all expert weights from Adam-like optimizers; a collective under FSDP2.

    An expert with parameters of its own that got no token is skipped by the optimizer: its moment is the mean over the
    steps that it took part in, and is scaled by their share, as that of a slice of a fused bank is by itself.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Optimizers that have taken a step; Lightning's or accelerate's wrappers are looked through.

    Raises:
        CurvatureError: An expert weight has no second moment in any of them: another kind of optimizer, frozen experts,
            state in 8 bits, or a flat shard (FSDP1, DeepSpeed).
    """
    moments = _second_moments(optimizers)
    norms = router_norms(layers).cpu().split([layer.num_experts for layer in layers])
    curvature = Curvature({layer.name: layer.shape for layer in layers})
    curvature.router_norms = {layer.name: of_layer.clone() for layer, of_layer in zip(layers, norms, strict=True)}
    for layer in layers:
        curvature.rows[layer.name], curvature.columns[layer.name] = {}, {}
        for name, bank in layer.banks.items():
            idle = [
                id(weight.parameter()) in moments and moments[id(weight.parameter())] is None for weight in bank.weights
            ]
            if all(idle):
                raise CurvatureError(f"no gradient has reached any expert of {layer.name!r}: train first")
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
    return curvature._check_values()


_Moments = dict[int, tuple[Tensor, float] | None]


def _second_moments(optimizers: Iterable[Any]) -> _Moments:
    """Parameter id -> (second moment, what divides it); None for a parameter in training that never had a gradient."""
    found: dict[int, tuple[Tensor, float, float]] = {}
    idle: list[int] = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            beta = float(group.get("betas", (0.0, 0.0))[1])
            for parameter in group["params"]:
                state = inner.state.get(parameter, {})
                if "exp_avg_sq" in state:
                    step = float(state.get("step", 0))
                    found[id(parameter)] = (state["exp_avg_sq"], 1 - beta**step if step else 1.0, step)
                elif not state and "betas" in group and parameter.requires_grad:
                    idle.append(id(parameter))
    most = max((step for *_, step in found.values()), default=0.0) or 1.0
    moments: _Moments = dict.fromkeys(idle)
    return moments | {key: (moment, by * most / (step or most)) for key, (moment, by, step) in found.items()}


def _means(weight: Weight, moments: _Moments) -> tuple[Tensor, Tensor]:
    """Means over the last and over the last but one dimension, float32 on the CPU."""
    known = moments.get(id(weight.parameter()), ())
    if known is None:
        return torch.zeros(weight.shape[:-1]), torch.zeros((*weight.shape[:-2], weight.shape[-1]))
    moment, by = known or (None, 1.0)
    if moment is None or tuple(moment.shape) != weight.shape or not moment.is_floating_point():
        raise CurvatureError(
            f"the optimizer has no second moment of shape {weight.shape} for {weight.name!r}: curvature is read from "
            "Adam and AdamW whose state is whole and of floats. Are the experts frozen, the optimizer another one, its "
            "state in 8 bits, or flat shards (FSDP1, DeepSpeed)?"
        )
    means = [moment.mean(dim=dimension, dtype=torch.float32) / by for dimension in (-1, -2)]
    whole = [mean.full_tensor() if isinstance(mean, DTensor) else mean for mean in means]
    return whole[0].cpu(), whole[1].cpu()
