"""The module tree of a model without its wrappers: what discovery looks at, and how a weight is read from it.

torch.compile, DDP, FSDP, DeepSpeed, activation checkpointing and PEFT put modules around modules and parameters behind
parameters. `module_tree` looks through all of them, so that names and shapes are those of the plain model, and each
`Weight` gives the values that the forward pass uses: a whole tensor, with adapters added, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from ..compat import (
    FLAT_PARAMETER,
    available_adapters,
    full_shape,
    is_zero3_parameter,
    own_parameters,
    wrapped_in,
)
from .naming import MoELayerError as MoELayerError
from .roots import root_model as root_model

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes whose values are the weights themselves; those of 8 bits have a scale beside them."""

_NUMBERED = re.compile(r"^(?:expert_?)?\d+$", re.IGNORECASE)
_ADDITIVE_TUNERS = ("lora", "loha", "lokr", "adalora", "vera")


@dataclass(eq=False)
class Weight:
    """A parameter by its place in the tree.

    Attributes:
        name: Clean name, e.g. ``model.layers.0.mlp.gate.weight``.
        shape: The whole tensor's shape, also where a rank holds a part of it.
        dtype: As the model holds it.
        unit: The FSDP1 module that holds it sharded, if there is one.
        gathers: Whether reading it takes `whole`, a collective: FSDP1 or DeepSpeed ZeRO-3.
        stored: The shape in which the module holds it, where that is not `shape`: the same values in the same order.
        master: Gives the float32 copy that is trained in place of a 16-bit weight, of the stored shape, or None.
        module: The module that owns it, inside all wrappers.
        key: Its name in that module.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: FullyShardedDataParallel | None = None
    gathers: bool = False
    module: Any = field(default=None, repr=False)
    key: str = field(default="", repr=False)
    _adapters: tuple[nn.Module, ...] = field(default=(), repr=False)  # innermost first
    _open: bool = field(default=False, repr=False)  # inside `whole`
    stored: tuple[int, ...] | None = None
    master: Callable[[], Tensor | None] | None = field(default=None, repr=False)

    @property
    def is_floating_point(self) -> bool:
        """Whether it is a weight at all; packed codes are not."""
        return self.dtype.is_floating_point

    @property
    def is_adapted(self) -> bool:
        """Whether PEFT adapters are around it, which change what the forward pass uses."""
        return bool(self._adapters)

    def parameter(self) -> Tensor:
        """The parameter itself, without adapters, as this rank holds it."""
        own = own_parameters(self.module).get(self.key)
        return getattr(self.module, self.key) if own is None else own

    def trained(self) -> Tensor:
        """What the optimizer moves, of `shape`: the float32 copy of a 16-bit weight if there is one, else `read`."""
        copy = None if self.master is None else self.master()
        return self.read() if copy is None else copy.view(self.shape)

    def read(self) -> Tensor:
        """The values that the forward pass uses, of `shape`; a DTensor under FSDP2, with the whole shape.

        Raises:
            MoELayerError: The tensor here is a shard, holds a quantizer's codes, or has an adapter whose effect on the
                weight is not known.
        """
        value = self.parameter()
        if value.dtype not in FLOATS:
            raise MoELayerError(f"{self.name!r} holds {value.dtype}: it was quantized after its layer was found")
        expected = self.shape if self.stored is None else self.stored
        if value.shape != expected or (self.unit is not None and not self._open):
            raise MoELayerError(
                f"{self.name!r} has shape {tuple(value.shape)} on this rank, expected {expected}: it is a shard "
                "(FSDP1, DeepSpeed ZeRO-3), whose values would be wrong. Read it inside MoELayer.whole()"
            )
        if self.stored is not None:  # a shard of a vector may end in the middle of a row
            value = (value.full_tensor() if isinstance(value, DTensor) else value).view(self.shape)
        for adapter in self._adapters:
            value = _with_adapter(adapter, value, self.name)
        return value


def _with_adapter(adapter: Any, base: Tensor, name: str) -> Tensor:
    """``base`` plus what the active adapters of a PEFT layer add to it, float32."""
    if adapter.merged or adapter.disable_adapters:
        return base
    active = [one for one in adapter.active_adapters if one in available_adapters(adapter)]
    tuner = [*type(adapter).__module__.split("."), "", ""][2]  # peft.tuners.<tuner>.layer
    variants = getattr(adapter, "lora_variant", {})
    if tuner not in _ADDITIVE_TUNERS or any(one in variants for one in active):
        raise MoELayerError(
            f"{name!r} is trained through PEFT's {tuner} ({type(adapter).__name__}), which does not simply add to the "
            "weight: its norm is not known. Train it with modules_to_save, or with plain LoRA (no DoRA)"
        )
    with torch.no_grad():
        for one in active:  # in float32: bfloat16 would round away what an adapter has learned
            base = base.float() + adapter.get_delta_weight(one).float().reshape(base.shape)
    return base


@dataclass(eq=False)
class Node:
    """A module by its place in the tree.

    Attributes:
        path: Clean path, empty for the root.
        module: The module itself, inside all wrappers.
        weights: Own parameters by name.
        children: Own children by name; those without parameters included.
    """

    path: str
    module: nn.Module
    weights: dict[str, Weight] = field(default_factory=dict)
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    def nodes(self) -> Iterator[Node]:
        """This node and all below, in module order; a module that occurs twice comes twice."""
        yield self
        for child in self.children.values():
            yield from child.nodes()

    def named_weights(self) -> Iterator[tuple[str, Weight]]:
        """All weights from here down, by their name relative to this node."""
        start = len(self.path) + 1 if self.path else 0
        for node in self.nodes():
            for weight in node.weights.values():
                yield weight.name[start:], weight

    def get(self, path: str) -> Node:
        """The node at a path relative to this one."""
        node = self
        for part in path.split(".") if path else []:
            node = node.children[part]
        return node


def module_tree(model: nn.Module) -> Node:
    """The tree of a model, or of the one transformers model inside it; names are relative to that.

    Under FSDP1 this is a collective: one unit after the other is gathered for a moment to see its shapes.
    """
    return _node("", root_model(model), _sharded_shapes(model))


_Shapes = dict[int, dict[str, tuple[FullyShardedDataParallel, tuple[int, ...], torch.dtype]]]


def _sharded_shapes(model: nn.Module) -> _Shapes:
    """What FSDP1 hides: ``id of module -> name -> (unit, shape, dtype)``; empty for every other model."""
    shapes: _Shapes = {}
    for unit in FullyShardedDataParallel.fsdp_modules(model):  # outer units first, so that inner ones overwrite
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for module in unit.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    shapes.setdefault(id(module), {})[name] = (unit, tuple(parameter.shape), parameter.dtype)
    return shapes


def _node(path: str, module: nn.Module, sharded: _Shapes) -> Node:
    module, adapters = _unwrapped(module)
    prefix = f"{path}." if path else ""
    node = Node(path, module)
    hidden = sharded.get(id(module), {})
    names = dict.fromkeys([*(n for n, p in own_parameters(module).items() if p is not None), *hidden])
    if parametrize.is_parametrized(module):
        names |= dict.fromkeys(module.parametrizations)  # type: ignore[arg-type]
    for name in names:
        if name == FLAT_PARAMETER:
            continue
        if name in hidden:
            unit, shape, dtype = hidden[name]
        else:
            parameter = getattr(module, name)
            unit, shape, dtype = None, full_shape(parameter), parameter.dtype
        gathers = unit is not None or is_zero3_parameter(getattr(module, name))
        added = tuple(adapter for adapter in adapters if getattr(adapter, "parameter_name", "weight") == name)
        node.weights[name] = Weight(prefix + name, shape, dtype, unit, gathers, module, name, added)
    for name, child in module.named_children():
        if name != "parametrizations" and not isinstance(child, AveragedModel):  # a copy of what is trained
            node.children[name] = _node(prefix + name, child, sharded)
    return node


def _unwrapped(module: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The module inside all wrappers, and the PEFT layers that were around it, the innermost first."""
    adapters: tuple[nn.Module, ...] = ()
    while True:
        children = dict(module.named_children())
        if (inner := wrapped_in(children)) is not None:
            module = inner
        elif hasattr(module, "peft_config") and "base_model" in children:  # PeftModel
            module = children["base_model"]
        elif hasattr(module, "targeted_module_names") and "model" in children:  # the tuner inside it
            module = children["model"]
        elif "modules_to_save" in children and "original_module" in children:
            wrapper: Any = module
            copies = dict(children["modules_to_save"].named_children())
            active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
            module = copies[active[0]] if active else children["original_module"]
        elif "base_layer" in children:
            adapters = (module, *adapters)
            module = children["base_layer"]
        else:
            return module, adapters


def numbered_children(node: Node) -> list[Node]:
    """Children called ``0``, ``expert_0``, ``expert0``, ... in order of number; empty if the numbers have gaps."""
    numbered = {}
    for name, child in node.children.items():
        if _NUMBERED.match(name) and next(child.named_weights(), None) is not None:
            numbered[int(re.sub(r"\D", "", name))] = child
    return [numbered[i] for i in sorted(numbered)] if sorted(numbered) == list(range(len(numbered))) else []


def is_numbered(name: str) -> bool:
    """Whether a child is called like one of many experts."""
    return bool(_NUMBERED.match(name))


@contextmanager
def whole(weights: Iterable[Weight]) -> Iterator[None]:
    """Gathers weights that FSDP1 or DeepSpeed ZeRO-3 has sharded, for reading; a collective, so on all ranks."""
    weights = list(weights)
    units = {id(w.unit): (w.unit, bool(w._adapters)) for w in weights if w.unit is not None}
    owners = {id(module): module for w in weights for module in (w.module, *w._adapters)}
    placeholders = {id(p): p for owner in owners.values() for p in owner.parameters() if is_zero3_parameter(p)}
    with ExitStack() as stack:
        for unit, recurse in units.values():
            summon = FullyShardedDataParallel.summon_full_params
            stack.enter_context(summon(unit, recurse=recurse, writeback=False))
        if placeholders:
            import deepspeed  # its ``zero`` is an attribute, not a module to import from

            stack.enter_context(deepspeed.zero.GatheredParameters(list(placeholders.values()), modifier_rank=None))
        for weight in weights:
            weight._open = True
        try:
            yield
        finally:
            for weight in weights:
                weight._open = False


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever mode a model is put into inside, its modules have the modes of before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
