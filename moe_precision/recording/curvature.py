"""Curvature: how sensitive the loss is to each expert matrix, as means of squared gradients by row and by column.

The means over the rows and over the columns of an estimate of the diagonal Fisher matrix are all that allocation and
quantization need: a few vectors per expert, so that both can run later and elsewhere. `second_moments` reads them from
an optimizer, `gradients` takes them from losses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoints.tensor_file import Nested, TensorFile, named, shapes_of
from ..errors import MoEPrecisionError
from ..layers.banks import Bank
from ..layers.expert_parallel import of_all
from ..layers.module_tree import Weight
from ..layers.moe_layers import MoELayer
from ..layers.prefixes import prefixes_of
from ..layers.shape import LayerShape
from .router_norms import check_same_weights, norms_by_layer

Means = tuple[Tensor, Tensor]  # over the last dimension and over the one before it, float32 on the CPU


class CurvatureError(MoEPrecisionError, ValueError):
    """No second moment to read, a damaged file, or curvature of another model."""


_FILE = TensorFile("moe-precision-curvature", 1, CurvatureError, "curvature")


@dataclass
class Curvature:
    """Row and column means of the second moment of every expert matrix.

    Attributes:
        layers: Layer name -> `LayerShape`, in module order.
        rows: Layer name -> projection name -> ``(E, out)`` float32.
        columns: Layer name -> projection name -> ``(E, in)`` float32.
        router_norms: Layer name -> ``(E,)`` float32 when it was taken, which identify the weights that it belongs to.

    Example:
        >>> curvature = Curvature.load("precision_plan.curvature.safetensors")
        >>> curvature.fit_weights("model.layers.0.mlp", "gate_up_proj", expert=0).shape
        torch.Size([64])
    """

    layers: dict[str, LayerShape]
    rows: Nested = field(default_factory=dict)
    columns: Nested = field(default_factory=dict)
    router_norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: list[MoELayer], means_of: Callable[[Weight], Means | None]) -> Curvature:
        """Curvature from the means of every weight; a collective where reading router norms is one.

        Args:
            layers: As found by `find_moe_layers`.
            means_of: The means of one parameter, in the parameter's own layout, a flat bank as a stack of matrices
                (`stacks_of`); None if it never had a gradient.

        Raises:
            CurvatureError: No weight of a projection ever had a gradient, or a mean is negative or not finite.
        """
        curvature = cls({layer.name: layer.shape for layer in layers})
        curvature.router_norms = norms_by_layer(layers)
        for layer in layers:
            found = {name: _of_bank(layer, bank, means_of) for name, bank in layer.banks.items()}
            curvature.rows[layer.name] = {name: rows for name, (rows, _) in found.items()}
            curvature.columns[layer.name] = {name: columns for name, (_, columns) in found.items()}
        return curvature._check_values()

    def fit_weights(self, layer: str, projection: str, expert: int) -> Tensor:
        """Weights of a matrix's input columns in the quantizer's fit, ``(in,)``: column means, damped by their mean."""
        columns = self.columns[layer][projection][expert]
        return columns + columns.mean()

    def for_layers(self, found: dict[str, LayerShape]) -> Curvature:
        """The curvature in the names of a model's layers: itself, or that of another class of the same model.

        Raises:
            CurvatureError: It belongs to another model.
        """
        change = prefixes_of(self.layers, found)
        if change is None:
            raise CurvatureError(
                f"the curvature belongs to another model: it has layers {list(self.layers)}, expected {list(found)}, "
                "or their shapes differ"
            )
        if change.equal:
            return self
        return Curvature(found, change.keys(self.rows), change.keys(self.columns), change.keys(self.router_norms))

    def check_router_norms(self, norms: dict[str, Tensor]) -> None:
        """Raises `CurvatureError` if router norms show that it belongs to other weights; see `check_same_weights`."""
        check_same_weights(self.router_norms, norms, "curvature", CurvatureError)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: ``rows/<layer>/<projection>``, ``columns/...`` likewise, and ``router_norms/<layer>``.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = named("router_norms", self.router_norms) | named("rows", self.rows) | named("columns", self.columns)
        _FILE.save(path, tensors, layers=shapes_of(self.layers))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curvature:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            CurvatureError: The file is damaged, of another version, or holds no curvature.
        """
        file = _FILE.load(path)
        layers = file.layers()
        norms = {name: file.tensor(f"router_norms/{name}") for name in layers}
        return cls(layers, file.nested("rows", layers), file.nested("columns", layers), norms)._check_values()


def as_curvature(curvature: Curvature | str | os.PathLike[str]) -> Curvature:
    """Takes curvature or the path of its file."""
    return curvature if isinstance(curvature, Curvature) else Curvature.load(curvature)


def stacks_of(layers: list[MoELayer]) -> dict[int, tuple[int, ...]]:
    """By id of the parameter: the shape ``(E, rows, columns)`` of every flat bank."""
    banks = [bank for layer in layers for bank in layer.banks.values()]
    return {id(bank.weights[0].parameter()): bank.stack for bank in banks if bank.stack is not None}


def row_and_column_means(values: Tensor, stack: tuple[int, ...] | None = None) -> Means:
    """Means over the last dimension and over the one before it, float32 on the CPU, gathered where sharded.

    Args:
        values: ``(..., rows, columns)``.
        stack: A shape to see the values in first, for flat banks; see `stacks_of`.
    """
    if stack is not None:  # a shard may end in the middle of an expert
        values = (values.full_tensor() if isinstance(values, DTensor) else values).reshape(stack)
    rows, columns = (values.mean(dim=dimension, dtype=torch.float32) for dimension in (-1, -2))
    whole = [mean.full_tensor() if isinstance(mean, DTensor) else mean for mean in (rows, columns)]
    return whole[0].cpu(), whole[1].cpu()


def _of_bank(layer: MoELayer, bank: Bank, means_of: Callable[[Weight], Means | None]) -> Means:
    """Means by output row ``(E, out)`` and by input column ``(E, in)``; zero for an expert that had no gradient."""
    found = [means_of(weight) for weight in bank.weights]
    if bank.parts == 1 and all(means is None for means in found):
        raise CurvatureError(f"no gradient has reached any expert of {layer.name!r}: train first")
    shape = bank.stack or bank.weights[0].shape
    sizes = shape[:-1], (*shape[:-2], shape[-1])
    zeros = tuple(torch.zeros(size, dtype=torch.float32) for size in sizes)
    rows, columns = zip(*(means or zeros for means in found), strict=True)
    if len(bank.weights) > 1:
        by_row, by_column = torch.stack(rows), torch.stack(columns)
    else:
        by_row, by_column = rows[0][: bank.local], columns[0][: bank.local]
    by_row, by_column = of_all(by_row, bank.parts), of_all(by_column, bank.parts)
    return (by_column, by_row) if bank.transposed else (by_row, by_column)
