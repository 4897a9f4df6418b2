"""A grid that training ends on: scale and offset of every group of every expert matrix, fixed.

While training anneals, every forward pass uses the nearest weights on the grid. The quantize step packs exactly these.
Where scales were distilled after training, the grid holds the codes too: those were rounded under statistics, which are
not the nearest.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...checkpoints.tensor_file import Nested, TensorFile, named
from ...errors import MoEPrecisionError
from ...layers.banks import Bank
from ...layers.moe_layers import MoELayer
from ...layers.prefixes import prefixes_of
from ...plans.plan import PrecisionPlan
from ...plans.widths import DROPPED, PlanError
from ...recording.curvature import Curvature
from ...recording.processes import of_first
from ...recording.router_norms import check_same_weights
from ...recording.statistics import ExpertStatistics
from ..kernels import scaled
from .fitting import Fit, Fits, Quantized, at_a_time, codes_on_grid, quantize_on_grid
from .guided import fit_of
from .packing import unpack

_CHUNK = 1 << 19  # weights at a time: their float32 stays in cache
_SAME = 0.01  # of a row's norm, by which its sum may differ: a half-precision dtype changes it by less than 0.003


class GridError(MoEPrecisionError, ValueError):
    """A grid that is damaged, or belongs to another plan or to other weights."""


_NESTED = ("scales", "offsets", "codes", "sums")  # the last two go together
_FILE = TensorFile("moe-precision-grid", 2, GridError, "grid")  # 1 held a plan of format 1


@dataclass
class Grid:
    """What a code means in every group.

    Attributes:
        plan: The widths; experts at 16 bits are left alone, those at 0 dropped.
        scales: Layer name -> projection -> ``(E, out, in / group)`` float16.
        offsets: Layer name -> projection -> ``(E, out, in / group)`` float16.
        router_norms: Layer name -> ``(E,)`` float32 when it was saved, which identify the weights that it belongs to.
        codes: Layer name -> projection -> ``(bytes,)`` uint8: the packed codes of all experts below 16 bits, one after
            the other; empty where codes are the nearest.
        sums: Layer name -> projection -> ``(E, out)`` float32: sums of the rows of the float weights that the codes are
            of; empty without codes.
    """

    plan: PrecisionPlan
    scales: Nested = field(default_factory=dict)
    offsets: Nested = field(default_factory=dict)
    router_norms: dict[str, Tensor] = field(default_factory=dict)
    codes: Nested = field(default_factory=dict)
    sums: Nested = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        layers: list[MoELayer],
        plan: PrecisionPlan,
        curvature: Curvature | None = None,
        statistics: ExpertStatistics | None = None,
        *,
        place: Callable[[Bank, Tensor], None] | None = None,
    ) -> Grid:
        """The grid that quantizing the weights as they are would choose, that of the first process; a collective.

        Args:
            layers: Of the model.
            plan: Their widths.
            curvature: Weighs the fit.
            statistics: Of the experts' inputs, to round under.
            place: Takes the quantized weights of each bank, ``(E, out, in)`` of its dtype, in which experts at 16 bits
                are as they were and those at 0 bits are 0.
        """
        grid = cls(plan)
        with torch.no_grad():
            for layer in layers:
                grid.scales[layer.name], grid.offsets[layer.name] = {}, {}
                for name, bank in layer.banks.items():
                    widths = plan.layers[layer.name].projection_bits[name]
                    fits = partial(fit_of, layer.name, name, curvature=curvature, statistics=statistics)
                    scales, offsets, placed = _fitted(bank, widths, plan.group_size, fits, place is not None)
                    # a last bit that differs between processes would part their weights for good
                    grid.scales[layer.name][name] = of_first(scales)
                    grid.offsets[layer.name][name] = of_first(offsets)
                    if place is not None:
                        assert placed is not None
                        place(bank, placed)
        return grid

    def state_dict(self) -> dict[str, object]:
        """Plain types and tensors, for a checkpoint."""
        return {"plan": self.plan.to_dict(), "scales": self.scales, "offsets": self.offsets}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Grid:
        """Inverse of `state_dict`."""
        return cls(PrecisionPlan.from_dict(state["plan"]), dict(state["scales"]), dict(state["offsets"]))

    def for_plan(self, plan: PrecisionPlan) -> Grid:
        """The grid in the names of a plan: itself, or that of the plan for another class of the same model.

        Raises:
            GridError: It is not the grid of this plan's widths and group size.
        """
        own, asked = ({name: layer.shape for name, layer in one.layers.items()} for one in (self.plan, plan))
        change = prefixes_of(own, asked)
        if self.plan.group_size != plan.group_size or self.plan.diff(plan):
            raise GridError("the grid belongs to another plan: widths or group size differ; give the plan beside it")
        if change is None or change.equal:
            return self
        nested = {name: change.keys(getattr(self, name)) for name in _NESTED if getattr(self, name)}
        return Grid(plan, router_norms=change.keys(self.router_norms), **nested)

    def fit_of(self, layer: str, projection: str, experts: Sequence[int]) -> Fit:
        """How matrices of one width are quantized: their codes are those that are held, or else the nearest."""
        held = list(experts)
        given = self.scales[layer][projection][held], self.offsets[layer][projection][held]
        if not self.codes:
            return partial(quantize_on_grid, grid=given)
        layer_plan = self.plan.layers[layer]
        out, inp = layer_plan.shape.projections[projection]
        sizes = [0 if bits == 16 else out * inp * bits // 8 for bits in layer_plan.projection_bits[projection]]
        starts = [sum(sizes[:expert]) for expert in held]
        codes = self.codes[layer][projection]
        packed = [codes[start : start + sizes[e]].view(out, -1) for e, start in zip(held, starts, strict=True)]
        return partial(_kept, torch.stack(packed), self.sums[layer][projection][held], given)

    def check_router_norms(self, norms: dict[str, Tensor], what: str = "grid") -> None:
        """Raises `GridError` if router norms show that it belongs to other weights; see `check_same_weights`."""
        check_same_weights(self.router_norms, norms, what, GridError)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors: ``scales/<layer>/<projection>``, ``offsets/...``, ``router_norms/<layer>``, and the plan;
        with codes also ``codes/...`` and ``sums/...``.

        Raises:
            OSError: The file cannot be written; an existing one is left as it was.
        """
        tensors = named("router_norms", self.router_norms)
        for kind in _NESTED:
            tensors |= named(kind, getattr(self, kind))
        _FILE.save(path, tensors, plan=self.plan.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Grid:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            GridError: The file is damaged, of another version, or holds no grid.
        """
        file = _FILE.load(path)
        try:
            plan = PrecisionPlan.from_dict(file.decoded("plan"), "its plan")
        except PlanError as error:
            raise file.damaged(str(error)) from error
        layers = {name: layer.shape for name, layer in plan.layers.items()}
        kept = any(name.startswith("codes/") for name in file.tensors)
        nested = {kind: file.nested(kind, layers) for kind in _NESTED[: 4 if kept else 2]}
        for name, layer in plan.layers.items() if kept else ():
            for projection, (out, inp) in layer.shape.projections.items():
                widths = layer.projection_bits[projection]
                size = sum(out * inp * bits // 8 for bits in widths if bits != 16)
                file.tensor(f"codes/{name}/{projection}", (size,))
                file.tensor(f"sums/{name}/{projection}", (len(widths), out))
                for kind in ("scales", "offsets"):
                    file.tensor(f"{kind}/{name}/{projection}", (len(widths), out, inp // plan.group_size))
        return cls(plan, router_norms=file.by_layer("router_norms", layers), **nested)


def _fitted(
    bank: Bank, widths: Sequence[int], group_size: int, fits: Fits, placed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales and offsets ``(E, out, in / group)`` of a bank, and if asked for its quantized values ``(E, out, in)``.

    Matrices are read in their order, one at a time, and small ones of one width are fitted together.
    """
    out, inp = bank.shape
    together = len(next(at_a_time(range(len(widths)), (out, inp))))
    scales, offsets, values = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    waiting: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def fit(bits: int) -> None:
        experts, matrices = zip(*waiting.pop(bits).items(), strict=True)
        quantized = fits(experts)(torch.stack(matrices), bits, group_size)
        for expert, *found in zip(experts, *quantized, strict=True):
            scales[expert], offsets[expert] = found[1:]
            if placed:
                values[expert] = scaled(*found).to(matrices[0].dtype)

    for expert, matrix in enumerate(bank.matrices()):
        whole = matrix.full_tensor() if isinstance(matrix, DTensor) else matrix
        if (bits := widths[expert]) in (DROPPED, 16):  # nothing to fit
            scales[expert] = offsets[expert] = whole.new_zeros(out, inp // group_size, dtype=torch.float16)
            values[expert] = whole if bits else torch.zeros_like(whole)
            continue
        waiting[bits][expert] = whole
        if len(waiting[bits]) == together:
            fit(bits)
    for bits in list(waiting):
        fit(bits)

    def of_all(found: dict[int, Tensor]) -> Tensor:
        return torch.stack([found[expert] for expert in range(len(widths))])

    return of_all(scales), of_all(offsets), of_all(values) if placed else None


def _kept(
    packed: Tensor, sums: Tensor, grid: tuple[Tensor, Tensor], weights: Tensor, bits: int, group_size: int
) -> Quantized:
    """Codes that are held, for the matrices ``(N, out, in)`` that they are of.

    Raises:
        ValueError: One is another.
    """
    away = (weights.float().sum(-1) - sums.to(weights.device)).abs()
    if not (away <= _SAME * weights.float().norm(dim=-1)).all():
        raise ValueError(
            f"the codes of a weight of shape {tuple(weights.shape[1:])} are those of another one: the experts were "
            "changed after their scales had been distilled. Leave that grid out (--grid none), and distill again "
            "(--distill-steps)"
        )
    scale, offset = (tensor.to(weights.device) for tensor in grid)
    return unpack(packed, bits).to(weights.device), scale, offset


def on_grid(weight: Tensor, bits: Sequence[int], scale: Tensor, offset: Tensor, out: Tensor | None = None) -> Tensor:
    """The nearest weights on a grid.

    Args:
        weight: ``(E, out, in)``, any float dtype and strides.
        bits: Width of each matrix; a matrix at 16 bits is copied, one at 0 becomes 0.
        scale: ``(E, out, in / group)``.
        offset: The same shape.
        out: Where to put them, like the weight.

    Returns:
        ``(E, out, in)``, of the weight's dtype: the values of the packed matrices, rounded to it.
    """
    out = torch.empty_like(weight) if out is None else out
    rows = max(1, _CHUNK // weight.shape[2])
    for expert, width in enumerate(bits):
        if width in (DROPPED, 16):
            out[expert].copy_(weight[expert]) if width else out[expert].zero_()
            continue
        for start in range(0, weight.shape[1], rows):
            chunk = (expert, slice(start, start + rows))
            place = out[chunk].unflatten(-1, (scale.shape[-1], -1))
            whole = place if out.dtype == torch.float32 else None
            values = codes_on_grid(weight[chunk], width, scale[chunk], offset[chunk], whole)
            values.mul_(scale[chunk].float().unsqueeze(-1)).add_(offset[chunk].float().unsqueeze(-1))
            if whole is None:
                place.copy_(values)
    return out
