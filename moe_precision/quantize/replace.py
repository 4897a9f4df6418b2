"""Swaps float experts for packed ones: the list of weights a plan quantizes, and how each is replaced.

A few functions serve a live model, a float checkpoint that is quantized while it loads, and a packed
checkpoint whose empty modules are made before its tensors are read.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..autocast import without_autocast
from ..compat import kept_in_float32, mark_as_read, runs_through_experts_interface, tied_names
from ..errors import MoEPrecisionError
from ..layers.moe_layers import MoELayer
from ..plans.plan import PrecisionPlan
from ..plans.widths import check_group_size
from ..recording.curvature import Curvature
from ..recording.statistics import ExpertStatistics
from .codec.fitting import Fit, Fits
from .codec.grid import Grid
from .codec.guided import fit_of, linear_fit_of
from .modules import PackedLinear, PackedProjection, check_implementation, sentinel


class UnsupportedLayoutError(MoEPrecisionError, NotImplementedError):
    """The model's experts are laid out in a way that cannot be packed yet."""


@dataclass(frozen=True)
class Target:
    """One parameter that becomes packed.

    Attributes:
        parameter: Full name of the float parameter.
        bits: Width of each expert for a fused parameter ``(E, ...)``, or one width for a matrix.
        shape: ``(out, in)`` of each matrix.
        fused: The parameter holds the matrices of all experts.
        fits: How some of its matrices are quantized, by their index.
        transposed: The parameter holds ``(in, out)`` matrices.
    """

    parameter: str
    bits: list[int]
    shape: tuple[int, int]
    fused: bool
    fits: Fits
    transposed: bool = False

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The parameter's own name in that module."""
        return self.parameter.rpartition(".")[2]


def find_targets(
    model: nn.Module,
    layers: list[MoELayer],
    plan: PrecisionPlan,
    non_expert_bits: int | None,
    curvature: Curvature | None = None,
    grid: Grid | None = None,
    statistics: ExpertStatistics | None = None,
) -> list[Target]:
    """Lists the parameters that a plan quantizes.

    Args:
        model: The float model, on any device (meta included).
        layers: Its layers, as found by `find_moe_layers` with the plan's patterns.
        plan: The plan, in the names of this model, as all that follows: `PlanQuantizationConfig.in_names_of`.
        non_expert_bits: 8 or 4 to list the other linear layers too.
        curvature: Weights the fit of each matrix.
        grid: Scales and offsets of each matrix, in place of a fit.
        statistics: Second moments of the inputs, which the fit rounds under; other linear layers too, where they are
            known.

    Raises:
        PlanError: The group size does not divide an input width.
        UnsupportedLayoutError: Experts in a layout that cannot be packed yet.
    """
    tied = _tied(model)
    targets = []
    for layer in layers:
        fit = partial(_fit, layer.name, curvature=curvature, grid=grid, statistics=statistics)
        targets += _expert_targets(layer, plan.layers[layer.name].projection_bits, tied, fit)
    if non_expert_bits is not None:
        for name in non_expert_linears(model, layers):
            module = model.get_submodule(name)
            shape = int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[index]
            check_group_size(plan.group_size, name, {"weight": shape})
            fits = partial(_always, linear_fit_of(name, statistics))
            targets.append(Target(f"{name}.weight", [non_expert_bits], shape, fused=False, fits=fits))
    return targets


def check_packable(model: nn.Module, layers: list[MoELayer]) -> None:
    """Raises `UnsupportedLayoutError` unless the experts of all layers can be packed; names layer and reason."""
    tied = _tied(model)
    for layer in layers:
        widths = {name: [2] * layer.num_experts for name in layer.projections}
        _expert_targets(layer, widths, tied, partial(_fit, layer.name, curvature=None, grid=None, statistics=None))


def _tied(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules share."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in names.items() if count > 1}


def _expert_targets(
    layer: MoELayer,
    projection_bits: dict[str, list[int]],
    tied: set[int],
    fit: Callable[[str, Sequence[int]], Fit],
) -> list[Target]:
    container = layer.container()
    path = layer.experts
    if layer.parts > 1:
        raise UnsupportedLayoutError(
            f"layer {layer.name!r}: its experts are split over {layer.parts} processes (expert parallelism); packing "
            "takes the gathered model, or its checkpoint"
        )
    shared = [bank.weights[0].name for bank in layer.banks.values() if id(bank.weights[0].parameter()) in tied]
    if shared:
        raise UnsupportedLayoutError(
            f"layer {layer.name!r}: {shared[0]!r} is shared with another module of the model, which would keep "
            "using its float weights; packing shared experts is not supported yet"
        )
    if layer.fused:
        if not runs_through_experts_interface(container):
            raise UnsupportedLayoutError(
                f"layer {layer.name!r}: the experts ({type(container).__name__}) are fused, but not through "
                "transformers' experts interface (use_experts_implementation), so packed experts cannot run there yet"
            )
        return [
            Target(
                f"{path}.{name}",
                projection_bits[name],
                shape,
                fused=True,
                transposed=layer.banks[name].transposed,
                fits=partial(fit, name),
            )
            for name, shape in layer.projections.items()
        ]
    if layer.layout != "modules":
        raise UnsupportedLayoutError(
            f"layer {layer.name!r}: the experts ({type(container).__name__}) are laid out as {layer.layout!r}; packed "
            "experts can replace fused 3-D parameters, and modules, one per expert"
        )
    targets = []
    names = {id(module): name for name, module in container.named_children()}
    for index, expert in enumerate(layer.expert_modules()):
        for projection, shape in layer.projections.items():
            parameter = f"{projection}.weight" if projection != "weight" else "weight"
            owner = expert.get_submodule(parameter.rpartition(".")[0])
            if not isinstance(owner, nn.Linear):
                raise UnsupportedLayoutError(
                    f"layer {layer.name!r}: {projection!r} of expert {index} belongs to a {type(owner).__name__}, "
                    "expected an nn.Linear"
                )
            bits = projection_bits[projection][index]
            if bits < 16:
                fits = partial(_always, fit(projection, [index]))
                name = f"{path}.{names[id(expert)]}.{parameter}"
                targets.append(Target(name, [bits], shape, fused=False, fits=fits))
    return targets


def _fit(
    layer: str,
    projection: str,
    experts: Sequence[int],
    *,
    curvature: Curvature | None,
    grid: Grid | None,
    statistics: ExpertStatistics | None,
) -> Fit:
    """How matrices of experts are quantized: on a given grid, or fitted by what is known of them."""
    if grid is not None:
        return grid.fit_of(layer, projection, experts)
    return fit_of(layer, projection, experts, curvature, statistics)


def _always(fit: Fit, indices: Sequence[int]) -> Fit:
    """The fit of a parameter that is one matrix."""
    return fit


def non_expert_linears(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """Names of the linear layers that ``non_expert_bits`` quantizes.

    Every ``nn.Linear`` outside experts, but routers, output embeddings, tied weights and what stays in float32.

    Args:
        model: The float model, on any device (meta included).
        layers: Its layers, as found by `find_moe_layers`.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    tied = set(tied_names(model))
    routers = {layer.router for layer in layers}
    kept = kept_in_float32(model)
    found = []
    for path, module in model.named_modules():
        name = f"{path}.weight"
        inside = any(path.startswith(layer.experts + ".") for layer in layers)
        if not isinstance(module, nn.Linear) or module is head or inside or name in routers | tied:
            continue
        if any(router.startswith(path + ".") for router in routers) or any(one.search(name) for one in kept):
            continue
        found.append(path)
    return found


def packed_tensors(model: nn.Module, targets: list[Target], group_size: int) -> dict[str, int]:
    """Name and bytes of every tensor that a model on the meta device will have when its targets are packed."""
    model = copy.deepcopy(model)
    for target in targets:
        replace_weight(model, target, group_size, weight=None)
    return {name: tensor.nbytes for name, tensor in model.state_dict().items()}


@torch.no_grad()
@without_autocast()
def replace_weight(model: nn.Module, target: Target, group_size: int, weight: Tensor | None) -> None:
    """Puts a packed weight in place of a float parameter.

    Args:
        model: The model, changed in place.
        target: Which parameter.
        group_size: Weights that share a scale and an offset.
        weight: The float weight to quantize, ``(E, ...)`` for a fused target; None for empty buffers on the
            parameter's device, to be filled from a packed checkpoint.

    Raises:
        ValueError: The weight cannot be quantized; the message names it.
    """
    parameter = model.get_parameter(target.parameter)
    if weight is not None and weight.shape != parameter.shape:
        raise ValueError(f"{target.parameter!r}: got shape {tuple(weight.shape)}, expected {tuple(parameter.shape)}")
    try:
        packed = (_replace_fused if target.fused else _replace_linear)(model, target, group_size, weight)
    except ValueError as error:
        raise ValueError(f"{target.parameter!r}: {error}") from error
    if weight is not None:
        mark_as_read(packed)


def _replace_fused(model: nn.Module, target: Target, group_size: int, weight: Tensor | None) -> list[Tensor]:
    module = model.get_submodule(target.module)
    parameter = module.get_parameter(target.name)
    device = parameter.device if weight is None else weight.device
    packed = PackedProjection(target.bits, target.shape, group_size, parameter.dtype, device)
    if weight is not None:
        packed.fill(weight.mT if target.transposed else weight, target.fits)
    delattr(module, target.name)
    mark = sentinel(parameter.dtype, device)
    module.register_buffer(target.name, mark)
    if not hasattr(module, "packed"):
        module.packed = nn.ModuleDict()
        module.register_forward_pre_hook(check_implementation)
    module.get_submodule("packed").add_module(target.name, packed)
    return [mark, *packed.buffers()]


def _replace_linear(model: nn.Module, target: Target, group_size: int, weight: Tensor | None) -> list[Tensor]:
    parent, _, leaf = target.module.rpartition(".")
    module = model.get_submodule(target.module)
    assert isinstance(module, nn.Linear)
    linear = PackedLinear(module, target.bits[0], group_size, module.weight.device if weight is None else weight.device)
    if weight is not None:
        linear.packed.put([0], weight.unsqueeze(0), target.fits([0]))
    setattr(model.get_submodule(parent), leaf, linear)
    return list(linear.buffers())
