"""Finds the Mixture-of-Experts layers of a model by structure: which parameter is the router, which hold the experts.

The rules for routers are in `routers`, those for experts in `experts`; both work on a `module_tree`, which looks
through wrappers. Nothing here changes a model or has a table of model families.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor, nn

from .banks import Bank, Experts, split_over, with_count
from .experts import find_experts, not_understood
from .floats import held_as_codes, held_by_others, quantizer_of
from .layer_checks import check_all_layers_here, not_matched, repeated, top_k_of, with_processes
from .layouts import experts_in_layout, fitting_layout
from .module_tree import MoELayerError, Node, Weight, module_tree, numbered_children, root_model, whole
from .naming import LAYOUTS, check_layout, check_pattern
from .orientation import maps_back, oriented
from .patterns import experts_by_pattern
from .router_rows import router_row_norms
from .routers import NoRouter, Router, find_router, product_keys
from .shape import LayerShape


@dataclass(frozen=True)
class MoELayer:
    """One router with its experts.

    Attributes:
        name: Clean module path of the smallest module that holds router and experts, e.g. ``model.layers.0.mlp``.
        experts: Clean module path of the container that holds the experts.
        shape: Router, number of experts and the shapes of their matrices.
        layout: ``fused``: slices of 3-D parameters; ``flat``: blocks of rows of 2-D ones; ``modules``: one module per
            expert; ``separate``: one parameter per expert, all in one module.
        caveat: A key of `CAVEATS` where a row's norm does not mean what it does for a plain router, else empty.
        width: Width of the layer's input, as its router reads it.
        router_is: Where the router's weight is; ``(d, rows)`` if ``router_transposed``.
        banks: Projection name -> where its matrices are.

    Example:
        >>> layer = find_moe_layers(model)[0]
        >>> layer.router, layer.num_experts
        ('model.layers.0.mlp.gate.weight', 8)
        >>> {name: tuple(matrix.shape) for name, matrix in layer.expert_weights(0).items()}
        {'gate_up_proj': (256, 64), 'down_proj': (64, 128)}
    """

    name: str
    experts: str
    shape: LayerShape
    layout: str
    caveat: str
    width: int = field(repr=False, compare=False)
    router_is: Weight = field(repr=False, compare=False)
    banks: dict[str, Bank] = field(repr=False, compare=False)
    router_transposed: bool = field(repr=False, compare=False)
    _node: Node = field(repr=False, compare=False)

    @property
    def router(self) -> str:
        """Clean name of the router's weight."""
        return self.shape.router

    @property
    def fused(self) -> bool:
        """Experts are slices of 3-D parameters."""
        return self.layout == "fused"

    @property
    def transposed(self) -> bool:
        """All of the experts' parameters hold ``(in, out)`` matrices."""
        return all(bank.transposed for bank in self.banks.values())

    @property
    def parts(self) -> int:
        """Over how many processes the experts are split as plain tensors (expert parallelism)."""
        return next(iter(self.banks.values())).parts

    @property
    def first_expert(self) -> int:
        """Index of the first expert that this process holds; 0 unless they are split as plain tensors."""
        return next(iter(self.banks.values())).start

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return self.shape.num_experts

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Name of each expert matrix -> ``(out, in)``."""
        return self.shape.projections

    def router_weight(self) -> Tensor:
        """The router's weight as the forward pass uses it now, ``(rows, d)``, any float dtype.

        Under LoRA that is base plus delta; under FSDP2 a DTensor.

        Raises:
            MoELayerError: It is sharded (FSDP1, DeepSpeed ZeRO-3) and not read inside `whole`.
        """
        weight = self.router_is.read()
        return weight.T if self.router_transposed else weight

    def row_norms(self) -> Tensor:
        """L2 norm of each expert's router row now, ``(E,)`` float32 on the router's device; a collective under FSDP2.

        Of the float32 copy that is trained, where `read_masters` has found one.

        Raises:
            MoELayerError: The router is sharded (FSDP1, DeepSpeed ZeRO-3) and not read inside `whole`.
        """
        return router_row_norms(
            self.router_is.trained(), num_experts=self.num_experts, transposed=self.router_transposed
        )

    def whole(self, experts: bool = True) -> AbstractContextManager[None]:
        """A context in which router and experts are whole under every strategy; a collective: enter it on all ranks.

        Args:
            experts: Gather the experts too, not only the router.
        """
        of_experts = [weight for bank in self.banks.values() for weight in bank.weights] if experts else []
        return whole([self.router_is, *of_experts])

    def container(self) -> nn.Module:
        """The module that holds the experts."""
        return self._node.module

    def expert_modules(self) -> list[nn.Module]:
        """One module per expert of this process, in order of index. Only for families that are not fused."""
        return [child.module for child in numbered_children(self._node)]

    def expert_weights(self, expert: int) -> dict[str, Tensor]:
        """The matrices of one expert, each ``(out, in)``, detached views of the model's own parameters."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"layer {self.name!r} has experts 0..{self.num_experts - 1}, got {expert}")
        return {name: bank.read(expert) for name, bank in self.banks.items()}

    @property
    def first(self) -> str:
        """Name of the projection whose rows are the experts' hidden neurons.

        The first that takes the layer's input; where neurons are as many as the layer is wide, not the one whose name
        shows that it maps back (``down_proj``).
        """
        reading = [name for name, (_, inp) in self.projections.items() if inp == self.width] or list(self.projections)
        return next((name for name in reading if not maps_back(name)), reading[0])

    def neurons(self, weight: Tensor) -> Tensor:
        """The gate's rows alone of a matrix of `first` where gate and up are one matrix, ``(neurons, in)``."""
        others = [shape for name, shape in self.projections.items() if name != self.first]
        if not (self.fused and len(others) == 1 and self.projections[self.first][0] == 2 * others[0][1]):
            return weight
        if getattr(self.container(), "is_concatenated", True):
            return weight[: weight.shape[0] // 2]  # [gate; up]
        return weight[0::2]  # gate and up interleaved

    def first_projection(self, expert: int) -> Tensor:
        """The matrix whose rows are the expert's hidden neurons (``wi``, ``w1`` or the gate), ``(neurons, in)``."""
        return self.neurons(self.banks[self.first].read(expert))


def find_moe_layers(
    model: nn.Module,
    *,
    skip_unrouted: bool = False,
    router_pattern: str | None = None,
    expert_pattern: str | None = None,
    layout: str | None = None,
) -> list[MoELayer]:
    """Finds every Mixture-of-Experts layer of a model, in module order.

    Experts are found as 3-D parameters that share their first dimension (fused families), as flat banks whose module
    tells the number of experts (dbrx), or as a numbered list of equal modules; the router is the matrix near them with
    one row per expert. Names are relative to the transformers model inside ``model``, if there is one.

    Args:
        model: Any module, on any device (meta included), wrapped or not. Under FSDP1 this is a collective.
        skip_unrouted: Leave out containers of experts for which no router is found instead of raising.
        router_pattern: Regular expression searched in clean weight names, to name the routers where structure does not
            show them; each list of experts gets the matching matrix that is nearest.
        expert_pattern: Regular expression searched in clean weight names, to name the experts' weights: with a group
            ``(?P<expert>\\d+)`` where each expert has its own
            (``r"experts\\.linear_fc[12]\\.weight(?P<expert>\\d+)"``), without one for banks of all experts. A group
            ``(?P<transposed>...)`` marks weights that hold ``(in, out)`` matrices, see `experts_by_pattern`.
        layout: Instead of patterns, the framework whose names and layout the model has: a key of `naming.LAYOUTS`.

    Raises:
        MoELayerError: No layer at all, experts without a router, two equally good routers, banks whose orientation
            nothing shows, a pattern or a layout that matches nothing, a model that is quantized, here or by another
            quantizer, or one whose layers or experts are split over processes in a way that cannot be put together.

    Example:
        >>> [layer.name for layer in find_moe_layers(model)]
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    for argument, pattern in (("router_pattern", router_pattern), ("expert_pattern", expert_pattern)):
        check_pattern(argument, pattern)
    check_layout(layout, router_pattern, expert_pattern)
    check_all_layers_here(model)
    tree = module_tree(model)
    held = held_by_others(tree)
    if "" in held:
        raise MoELayerError(held[""])
    if layout is not None:
        candidates, router_pattern = experts_in_layout(tree, layout), LAYOUTS[layout].router
    else:
        candidates = find_experts(tree) if expert_pattern is None else experts_by_pattern(tree, expert_pattern)
    candidates = [with_processes(tree, experts) for experts in candidates]
    layers: list[MoELayer] = []
    problems: list[str] = []
    unrouted: list[str] = []
    taken: list[Experts] = []
    routers: dict[int, tuple[Experts, int]] = {}  # identity of experts -> where they were found, their router
    for experts in candidates:
        if any(experts.path.startswith(outer.path + ".") for outer in taken):
            continue  # part of an expert
        found = find_router(tree, experts, candidates, router_pattern)
        if found is None:
            continue
        taken.append(experts)
        if isinstance(found, str):
            (unrouted if isinstance(found, NoRouter) else problems).append(found)
            continue
        first, router = routers.setdefault(experts.identity, (experts, id(found.weight.parameter())))
        if first is experts:
            layers.append(_describe(experts, found))
        elif router != id(found.weight.parameter()):  # else one layer under two names: encoder and decoder share it
            problems.append(
                f"experts at {experts.path!r} are those at {first.path!r}, under another router: one width cannot "
                "serve two orders"
            )
    problems += [text for path, text in held.items() if any(layer.name.startswith(f"{path}.") for layer in layers)]
    problems += held_as_codes(tree, [experts.path for experts in taken])
    problems += not_understood(tree, taken) + product_keys(tree)
    if expert_pattern is not None or layout is not None:
        problems += not_matched(tree, taken, "expert_pattern" if layout is None else f"layout={layout!r}")
    problems += repeated([layer.router for layer in layers], "router")
    problems += repeated([layer.name for layer in layers], "layer")
    problems += [] if skip_unrouted else unrouted
    named = None if layout else fitting_layout(tree)
    hint = f". These are the names of {named}: layout={named!r} finds them" if named else ""
    if problems:
        raise MoELayerError("; ".join(problems) + hint)
    if not layers and held:
        raise MoELayerError("; ".join(held.values()))
    if not layers and quantizer_of(root_model(model)):
        raise MoELayerError(f"the experts of this {type(model).__name__} are quantized already; take the float model")
    if not layers:
        raise MoELayerError(
            f"no Mixture-of-Experts layer found in {type(model).__name__}: expected experts as 3-D parameters or as a "
            "numbered list of equal modules, with a router that has one row per expert. Is this a dense model? Else "
            "name its weights with router_pattern and expert_pattern" + hint
        )
    return layers


def _describe(experts: Experts, router: Router) -> MoELayer:
    rows = router.weight.shape[1 if router.transposed else 0]
    if experts.num_experts == 0:
        experts = with_count(experts, rows)
    experts = split_over(experts, router.root.path, rows)
    banks = oriented(experts, router.width)
    shapes = {name: bank.shape for name, bank in banks.items()}
    return MoELayer(
        name=router.root.path,
        experts=experts.path,
        shape=LayerShape(router.weight.name, experts.num_experts, shapes, experts.template, top_k_of(experts, router)),
        layout=experts.layout,
        caveat=router.caveat,
        width=router.width,
        router_is=router.weight,
        banks=banks,
        router_transposed=router.transposed,
        _node=experts.node,
    )
