"""The optimizer's own knowledge of where experts are sensitive: means of Adam's second moment, by row and by column.

An adaptive optimizer holds a running mean of squared gradients for every weight, an estimate of the diagonal of the
empirical Fisher matrix. Its means over the rows and over the columns of each expert matrix are all that allocation
and quantization need, a few vectors an expert, so that both can run later and elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import MoEPrecisionError
from ..files import save_tensors
from ..layers.module_tree import Weight
from ..layers.moe_layers import LayerShape, MoELayer
from .router_norms import HistoryError, check_same_weights, norms_by_layer

_FORMAT = "moe-precision-curvature"
_VERSION = 1
_ADAPTIVE = ("betas", "beta2_decay", "decay_rate")  # in groups of Adam, of torch's Adafactor and of transformers'
_BNB_BLOCK = 256  # weights that share a scale in bitsandbytes' optimizer state


class CurvatureError(MoEPrecisionError, ValueError):
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
        try:
            check_same_weights(self.router_norms, norms, "curvature")
        except HistoryError as error:
            raise CurvatureError(str(error)) from None

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


def curvature_path(plan: str | os.PathLike) -> Path:
    """Where a run keeps the curvature of a plan: ``x.curvature.safetensors`` beside ``x.json``."""
    return Path(plan).with_suffix(".curvature.safetensors")


def as_curvature(curvature: Curvature | str | os.PathLike) -> Curvature:
    """Takes curvature or the path of its file."""
    return curvature if isinstance(curvature, Curvature) else Curvature.load(curvature)


def curvature_of(layers: list[MoELayer], optimizers: Iterable[Any]) -> Curvature:
    """Reads the second moments of all expert weights from Adam-like optimizers; a collective under FSDP2.

    Adam and AdamW (fused ones and torchao's 8- and 4-bit ones too), Adafactor, whose state is these means, and
    bitsandbytes' 8-bit Adam. An expert with parameters of its own that got no token is skipped by the optimizer: its
    moment is the mean over the steps that it took part in, and is scaled by their share, as that of a slice of a fused
    bank is by itself.

    Args:
        layers: As found by `find_moe_layers`.
        optimizers: Optimizers that have taken a step; Lightning's or accelerate's wrappers are looked through.

    Raises:
        CurvatureError: An expert weight has no second moment in any of them: another kind of optimizer, frozen experts,
            or a flat shard (FSDP1, DeepSpeed).
    """
    moments = _second_moments(optimizers)

    def of(weight: Weight) -> _Means | None:
        shape = weight.shape
        found = moments.get(id(weight.parameter()), ())
        if found is None:
            return None
        if not found or tuple(found[0].shape) != shape[:-1] or tuple(found[1].shape) != (*shape[:-2], shape[-1]):
            raise CurvatureError(
                f"the optimizer has no second moment of shape {shape} for {weight.name!r}: curvature is read from "
                "Adam, AdamW and Adafactor whose state is whole. Are the experts frozen, the optimizer another one, or "
                "its state in flat shards (FSDP1, DeepSpeed)? curvature_batches=N takes squared gradients instead"
            )
        return found

    return _assembled(layers, of)


def curvature_of_losses(layers: list[MoELayer], losses: Iterable[Callable[[], Tensor | None]]) -> Curvature:
    """Means of the squared gradients of some losses, for experts whose optimizer keeps no second moment.

    With many processes it is a collective: DDP and FSDP2 average gradients of what they train, those of frozen experts
    are averaged here. Gradients of all parameters are left as the last loss made them.

    Args:
        layers: As found by `find_moe_layers`; frozen experts are unfrozen while this runs.
        losses: Each computes the loss of one batch, ``()``, or None to skip it; batches of the size of training's keep
            costs on the scale of the optimizer's.

    Raises:
        CurvatureError: No loss at all, a gradient that is not finite, or none reaches any expert of a layer.
    """
    weights = [weight for layer in layers for bank in layer.banks.values() for weight in bank.weights]
    parameters = [weight.parameter() for weight in weights]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    sums: dict[int, _Means] = {}
    count = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for loss in losses:
            for parameter in parameters:
                parameter.grad = None
            value = loss()
            if value is None:
                continue
            value.backward()
            count += 1
            for parameter in frozen if many else ():
                if isinstance(parameter, DTensor):
                    continue
                # DDP averages the gradients of what it trains alone
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            for parameter in parameters:
                if parameter.grad is not None:
                    squared = _means(parameter.grad.float().square())
                    before = sums.get(id(parameter))
                    sums[id(parameter)] = (
                        squared if before is None else (before[0] + squared[0], before[1] + squared[1])
                    )
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(False)
    if count == 0:
        raise CurvatureError("no batch gave a loss to take gradients of")

    def of(weight: Weight) -> _Means | None:
        found = sums.get(id(weight.parameter()))
        return None if found is None or not found[0].any() else (found[0] / count, found[1] / count)

    return _assembled(layers, of)


_Means = tuple[Tensor, Tensor]  # over the last and over the last but one dimension


def _assembled(layers: list[MoELayer], means_of: Callable[[Weight], _Means | None]) -> Curvature:
    """Curvature from the means of every weight; None for one that never had a gradient."""
    curvature = Curvature({layer.name: layer.shape for layer in layers})
    curvature.router_norms = norms_by_layer(layers)
    for layer in layers:
        curvature.rows[layer.name], curvature.columns[layer.name] = {}, {}
        for name, bank in layer.banks.items():
            found = [means_of(weight) for weight in bank.weights]
            if all(means is None for means in found):
                raise CurvatureError(f"no gradient has reached any expert of {layer.name!r}: train first")
            shape = bank.weights[0].shape
            zeros = torch.zeros(shape[:-1]), torch.zeros((*shape[:-2], shape[-1]))
            rows, columns = zip(*(means or zeros for means in found), strict=True)
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


def _second_moments(optimizers: Iterable[Any]) -> dict[int, _Means | None]:
    """Parameter id -> means of its second moment; None for a parameter in training that never had a gradient."""
    found: dict[int, tuple[_Means, float]] = {}
    idle: list[int] = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        for group in inner.param_groups:
            beta = float(group.get("betas", (0.0, 0.0))[1])
            for parameter in group["params"]:
                state = inner.state.get(parameter, {})
                step = float(state.get("step", 0))
                means = _means_in(state, parameter) if parameter.ndim >= 2 else None
                if means is not None:
                    unbiased = 1 - beta**step if step and beta else 1.0
                    found[id(parameter)] = ((means[0] / unbiased, means[1] / unbiased), step)
                elif not state and parameter.requires_grad and any(key in group for key in _ADAPTIVE):
                    idle.append(id(parameter))
    most = max((step for _, step in found.values()), default=0.0) or 1.0
    moments: dict[int, _Means | None] = dict.fromkeys(idle)
    for key, (means, step) in found.items():
        share = (step or most) / most
        moments[key] = (means[0] * share, means[1] * share)
    return moments


def _means_in(state: dict[str, Any], parameter: Tensor) -> _Means | None:
    """Means of a second moment in the form that each optimizer keeps it, float32 on the CPU."""
    if isinstance(moment := state.get("exp_avg_sq"), Tensor):  # Adam
        if hasattr(moment, "dequantize") and hasattr(moment, "block_size"):  # torchao's
            moment = moment.dequantize()
        return _means(moment) if moment.is_floating_point() and moment.ndim >= 2 else None
    for rows, columns in (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")):  # Adafactor, torch's and HF's
        if isinstance(state.get(rows), Tensor):
            leading, inp = parameter.shape[:-1], (*parameter.shape[:-2], parameter.shape[-1])
            return state[rows].float().cpu().reshape(leading), state[columns].float().cpu().reshape(inp)
    if isinstance(state.get("state2"), Tensor) and state["state2"].dtype == torch.uint8:  # bitsandbytes' Adam8bit
        from bitsandbytes.functional import dequantize_blockwise

        absmax, code = state["absmax2"], state["qmap2"]
        moment = dequantize_blockwise(state["state2"], absmax=absmax, code=code, blocksize=_BNB_BLOCK)
        return _means(moment.view(parameter.shape))
    if isinstance(state.get("state2"), Tensor):  # its float32 form, for small tensors
        return _means(state["state2"].view(parameter.shape))
    return None


def _means(moment: Tensor) -> _Means:
    rows, columns = (moment.mean(dim=dimension, dtype=torch.float32) for dimension in (-1, -2))
    whole = [mean.full_tensor() if isinstance(mean, DTensor) else mean for mean in (rows, columns)]
    return whole[0].cpu(), whole[1].cpu()
