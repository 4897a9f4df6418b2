"""Finds the Mixture-of-Experts layers of a model by structure: which parameter is the router, which hold the experts.

This is the only file that knows how model families lay out routers and experts. It never changes a model and never
looks at a model's class name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NUMBERED = re.compile(r"^(?:expert_?)?\d+$", re.IGNORECASE)
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"(?:^|[._])(?:routers?|gate|gating|wg|classifier|switch|route)(?:$|[._])", re.IGNORECASE)
_NOT_ROUTER = re.compile(
    r"noise|shared|gate_proj|per_layer|forget|attn|attention|norm|embed|lora_|bias|original_module", re.IGNORECASE
)
_MAX_CLIMB = 3  # how many parents above the experts may hold the router


class MoELayerError(ValueError):
    """The model has no Mixture-of-Experts layer, or one that cannot be described without guessing."""


def clean_name(name: str) -> str:
    """Removes the wrappers of torch.compile, DDP, FSDP, activation checkpointing and PEFT from a module path."""
    name = name.removeprefix("base_model.model.")
    while (cleaned := _WRAPPERS.sub("", name)) != name:
        name = cleaned
    return name


@dataclass(frozen=True)
class LayerShape:
    """What a history and a plan know of a layer.

    Attributes:
        router: Clean name of the router's weight, ``(rows, d)`` with row ``e`` belonging to expert ``e``; a few
            families have more rows than experts (shared or null experts), which come last.
        num_experts: Number of routed experts ``E``.
        projections: Name of each expert matrix -> ``(out, in)``, in the order of the forward pass. Fused families
            name the parameter (``gate_up_proj``), others the path inside one expert (``wi``).
    """

    router: str
    num_experts: int
    projections: dict[str, tuple[int, int]]

    @property
    def expert_size(self) -> int:
        """Weights of one expert, all matrices together."""
        return sum(out * inp for out, inp in self.projections.values())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerShape:
        """Inverse of `to_dict`."""
        shapes = {name: (int(out), int(inp)) for name, (out, inp) in data["projections"].items()}
        return cls(data["router"], data["num_experts"], shapes)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints and JSON."""
        shapes = {name: list(shape) for name, shape in self.projections.items()}
        return {"router": self.router, "num_experts": self.num_experts, "projections": shapes}


@dataclass(frozen=True)
class MoELayer:
    """One router with its experts.

    Attributes:
        name: Clean module path of the smallest module that holds router and experts, e.g. ``model.layers.0.mlp``.
        experts: Clean module path of the container that holds the experts.
        shape: Router, number of experts and the shapes of their matrices.
        fused: Experts are slices of 3-D parameters; else each expert is a module of its own.
        transposed: The parameters hold ``(in, out)`` matrices.
    """

    name: str
    experts: str
    shape: LayerShape
    fused: bool
    transposed: bool
    _model: nn.Module = field(repr=False, compare=False)
    _router_module: nn.Module = field(repr=False, compare=False)
    _router_name: str = field(repr=False, compare=False)
    _raw_experts: str = field(repr=False, compare=False)

    @property
    def router(self) -> str:
        """Clean name of the router's weight."""
        return self.shape.router

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return self.shape.num_experts

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Name of each expert matrix -> ``(out, in)``."""
        return self.shape.projections

    def router_weight(self) -> Tensor:
        """The router's weight as the model holds it now, ``(rows, d)``, any float dtype."""
        weight = self._router_module._parameters.get(self._router_name)  # skips nn.Module.__getattr__: called often
        return getattr(self._router_module, self._router_name) if weight is None else weight

    def container(self) -> nn.Module:
        """The module that holds the experts."""
        return self._model.get_submodule(self._raw_experts)

    def expert_modules(self) -> list[nn.Module]:
        """One module an expert, in order of expert index. Only for families that are not fused."""
        return _numbered_children(self.container())

    def expert_weights(self, expert: int) -> dict[str, Tensor]:
        """The matrices of one expert, each ``(out, in)``, detached views of the model's own parameters."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"layer {self.name!r} has experts 0..{self.num_experts - 1}, got {expert}")
        if self.fused:
            bank = {name: self.container().get_parameter(name).detach()[expert] for name in self.projections}
            return {name: weight.T if self.transposed else weight for name, weight in bank.items()}
        module = self.expert_modules()[expert]
        return {name: module.get_parameter(_weight_name(module, name)).detach() for name in self.projections}

    def first_projection(self, expert: int) -> Tensor:
        """The matrix whose rows are the expert's hidden neurons (``wi``, ``w1`` or the gate), ``(neurons, in)``."""
        width = self.router_weight().shape[1]
        reading = [name for name, (_, inp) in self.projections.items() if inp == width]  # takes the layer's input
        name = (reading or list(self.projections))[0]
        weight, shapes = self.expert_weights(expert)[name], list(self.projections.values())
        if not (self.fused and len(shapes) == 2 and shapes[0][0] == 2 * shapes[1][1]):
            return weight
        if getattr(self.container(), "is_concatenated", True):
            return weight[: weight.shape[0] // 2]  # [gate; up]
        return weight[0::2]  # gate and up interleaved


def find_moe_layers(model: nn.Module, skip_unrouted: bool = False) -> list[MoELayer]:
    """Finds every Mixture-of-Experts layer of a model, in module order.

    Experts are found as 3-D parameters that share their first dimension (fused families) or as a numbered list of
    equal modules; the router is the matrix near them with one row an expert.

    Args:
        model: Any module, on any device (meta included), wrapped or not.
        skip_unrouted: Leave out containers of experts for which no router is found instead of raising.

    Raises:
        MoELayerError: No layer at all, experts without a router, or two equally good routers.
    """
    containers = list(_expert_containers(model))
    paths = [path for path, *_ in containers]
    layers: list[MoELayer] = []
    problems: list[str] = []
    taken: list[str] = []
    for path, num_experts, fused, named in containers:
        if any(path.startswith(outer + ".") for outer in taken):
            continue  # part of an expert
        found = _find_router(model, path, num_experts, named, paths)
        if found is None:
            continue
        taken.append(path)
        if isinstance(found, str):
            problems.append(found)
        else:
            layers.append(_describe(model, path, num_experts, fused, *found))
    problems += _not_understood(model, [layer._raw_experts for layer in layers], paths)
    problems += _twice([layer.router for layer in layers], "router") + _twice([layer.name for layer in layers], "layer")
    if problems and not skip_unrouted:
        raise MoELayerError("; ".join(problems))
    if not layers and getattr(model, "is_quantized", False):
        raise MoELayerError(f"the experts of this {type(model).__name__} are quantized already; take the float model")
    if not layers:
        raise MoELayerError(
            f"no Mixture-of-Experts layer found in {type(model).__name__}: expected experts as 3-D parameters or as a "
            "numbered list of equal modules, with a router that has one row an expert. Is this a dense model?"
        )
    return layers


def root_model(module: nn.Module) -> nn.Module:
    """The transformers model inside a LightningModule or a wrapper, or the module itself if it holds none.

    Layer names are relative to it, so that a plan made in training fits the checkpoint saved afterwards.
    """
    return next((part for part in module.modules() if isinstance(part, PreTrainedModel)), module)


def _expert_containers(model: nn.Module) -> Iterator[tuple[str, int, bool, bool]]:
    """Yields ``(path, num_experts, fused, named like experts)`` for all that may hold experts, outer ones first."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if _is_shared(path):
            continue
        fused = _fused_parameters(module)
        if fused:
            first = next(iter(fused.values()))
            if id(first) not in seen:  # else one bank under two names: encoder and decoder share it
                seen.add(id(first))
                yield path, min(_shape(p)[0] for p in fused.values()), True, _named_like_experts(path, module)
            continue
        children = _numbered_children(module)
        if len(children) >= 2 and _are_experts(children):
            yield path, len(children), False, _named_like_experts(path, module)


def _not_understood(model: nn.Module, found: list[str], candidates: list[str]) -> list[str]:
    """Modules called ``experts`` with weights in a layout that no rule here covers: they must not be skipped."""
    return [
        f"the weights of {clean_name(path)!r} ({type(module).__name__}) are in a layout that is not understood"
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "experts"
        and not _is_shared(path)
        and path not in candidates
        and not any(f"{layer}.".startswith(f"{path}.") or path.startswith(f"{layer}.") for layer in found)
        and any(len(_shape(p)) >= 2 for p in module.parameters())
    ]


def _is_shared(path: str) -> bool:
    """Shared experts see every token: no router chooses them, and they are left alone."""
    return any("shared" in part for part in path.split(".")[-2:])


def _twice(names: list[str], what: str) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [f"{what} {name!r} would serve two lists of experts" for name in repeated]


def _named_like_experts(path: str, module: nn.Module) -> bool:
    own = f"{path.rpartition('.')[2]} {type(module).__name__}"
    return bool(_EXPERT_NAME.search(own)) or any(n.lower().startswith("expert") for n, _ in module.named_children())


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: a ZeRO-3 placeholder


def _fused_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Own 3-D float parameters of a module that share their first dimension, or those of its one-weight children."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    own: dict[str, Tensor] = {
        n: p for n, p in module.named_parameters(recurse=False) if len(_shape(p)) == 3 and p.is_floating_point()
    }
    if not own:
        for child_name, child in module.named_children():
            weights = list(child.named_parameters(recurse=False))
            if len(weights) == 1 and len(_shape(weights[0][1])) == 3 and not isinstance(child, nn.modules.conv._ConvNd):
                own[f"{child_name}.{weights[0][0]}"] = weights[0][1]
    sizes = {_shape(p)[0] for p in own.values()}
    alike = len(sizes) == 1 or bool(_EXPERT_NAME.search(type(module).__name__))  # longcat: a bank has unused slices
    return own if len(own) >= 2 and alike and min(sizes) >= 2 else {}


def _numbered_children(module: nn.Module) -> list[nn.Module]:
    """Children called ``0``, ``expert_0``, ``expert0``, ... in order of number; empty if the numbers have gaps."""
    numbered = {}
    for name, child in module.named_children():
        if _NUMBERED.match(name) and next(child.parameters(), None) is not None:
            numbered[int(re.sub(r"\D", "", name))] = child
    return [numbered[i] for i in sorted(numbered)] if sorted(numbered) == list(range(len(numbered))) else []


def _are_experts(children: list[nn.Module]) -> bool:
    """Equal modules of matrices and vectors only, with at least one matrix, and no attention, embedding or experts."""

    def signature(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, _shape(p)) for name, p in module.named_parameters()]

    first = signature(children[0])
    if not any(len(shape) == 2 for _, shape in first) or any(len(shape) > 2 for _, shape in first):
        return False
    for name, module in children[0].named_modules():
        if re.search(r"attn|attention", name, re.IGNORECASE) or isinstance(module, nn.Embedding):
            return False
        if name and len(_numbered_children(module)) >= 2 and _named_like_experts(name, module):
            return False  # a stack of layers with experts of their own
    return all(type(child) is type(children[0]) and signature(child) == first for child in children[1:])


def _find_router(
    model: nn.Module, path: str, num_experts: int, named: bool, containers: list[str]
) -> tuple[str, str] | str | None:
    """Looks for the router around one container, from the container itself outwards.

    Returns:
        ``(raw router name, raw path of the module that holds both)``; a message if experts that are named as such
        have no clear router; None if an unnamed list is no Mixture-of-Experts layer after all.
    """
    parts = path.split(".") if path else []
    best: dict[tuple, list[tuple[str, str]]] = {}  # rank, the lowest is the best -> (router name, root path)
    for climb in range(min(_MAX_CLIMB, len(parts)) + 1):
        root_path = ".".join(parts[: len(parts) - climb])
        root = model.get_submodule(root_path)
        if climb and isinstance(root, (nn.ModuleList, nn.ModuleDict)):
            break
        prefix = f"{root_path}." if root_path else ""
        for name, parameter in root.named_parameters():
            rank = _router_rank(name, _shape(parameter), num_experts, named and climb <= 1)
            if rank is None or (rank[1] and not named) or _is_hash_router(root, name):
                continue
            if not _belongs_elsewhere(prefix, name, path, containers):
                best.setdefault((*rank[:2], climb, *rank[2:]), []).append((prefix + name, root_path))
        if any(rank[0] == 0 for rank in best):
            break  # a matrix that is called a router: no need to look further out
    if not best:
        message = f"experts at {clean_name(path)!r} have no router: no matrix with {num_experts} rows near them"
        return message if named else None
    winners = best[min(best)]
    if len(winners) > 1:
        names = ", ".join(clean_name(full) for full, _ in winners)
        return f"experts at {clean_name(path)!r} have several possible routers: {names}"
    return winners[0]


def _router_rank(name: str, shape: tuple[int, ...], num_experts: int, near: bool) -> tuple[int, ...] | None:
    """How well a parameter would do as a router, lower is better; None if it cannot be one.

    Beside experts that are named so (``near``), a matrix of any name will do; further out it must be called a router.
    """
    relative = name.removesuffix(".weight").removesuffix(".base_layer")
    if len(shape) != 2 or _NOT_ROUTER.search(relative):
        return None
    router_like = bool(_ROUTER_NAME.search(relative))
    extra = shape[0] - num_experts  # rows of shared or null experts
    if extra and not (router_like and 0 < extra <= 2 * num_experts and shape[1] != num_experts):
        return None
    if not router_like and not near:
        return None
    return (0 if router_like else 1, int(extra > 0), extra, relative.count("."))


def _is_hash_router(root: nn.Module, name: str) -> bool:
    """A router that looks experts up by token id (deepseek_v4) holds the table; its rows do not choose experts."""
    return hasattr(root.get_submodule(name.rpartition(".")[0]), "tid2eid")


def _belongs_elsewhere(prefix: str, name: str, path: str, containers: list[str]) -> bool:
    """Whether a parameter is a weight of an expert, or sits in a branch with other experts: it is their router then."""
    full, branch = prefix + name, prefix + name.split(".")[0]
    if full.startswith(path + "."):
        return bool(_NUMBERED.match(full.removeprefix(path + ".").split(".")[0]))
    return any(f"{other}.".startswith(f"{branch}.") for other in containers if other != path)


def _describe(model: nn.Module, path: str, num_experts: int, fused: bool, router: str, root: str) -> MoELayer:
    container = model.get_submodule(path)
    transposed = False
    projections: dict[str, tuple[int, int]] = {}
    if fused:
        shapes = {name: _shape(p)[1:] for name, p in _fused_parameters(container).items()}
        width = _shape(model.get_parameter(router))[1]
        first = next(iter(shapes.values()))
        transposed = bool(getattr(container, "is_transposed", first[0] == width and first[1] != width))
        projections = {n: (s[1], s[0]) if transposed else (s[0], s[1]) for n, s in shapes.items()}
    else:
        expert = _numbered_children(container)[0]
        for name, parameter in expert.named_parameters():
            if len(_shape(parameter)) == 2:
                rows, columns = _shape(parameter)
                projections[name.removesuffix(".weight")] = (rows, columns)
    return MoELayer(
        name=clean_name(root),
        experts=clean_name(path),
        shape=LayerShape(clean_name(router), num_experts, projections),
        fused=fused,
        transposed=transposed,
        _model=model,
        _router_module=model.get_submodule(router.rpartition(".")[0]),
        _router_name=router.rpartition(".")[2],
        _raw_experts=path,
    )


def _weight_name(module: nn.Module, projection: str) -> str:
    """Full parameter name of a projection inside one expert: ``wi`` -> ``wi.weight``, unless it is a bare parameter."""
    return projection if projection in dict(module.named_parameters()) else f"{projection}.weight"
