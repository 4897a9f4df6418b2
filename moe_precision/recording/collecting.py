"""Expert statistics from forward passes on some text, in as many passes over it as a bound on memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..layers.materialized import check_materialized
from ..layers.module_tree import modes_kept, root_model
from ..layers.moe_layers import MoELayer, find_moe_layers
from .batches import run_batch
from .collector import Collector
from .linear_inputs import LinearCollector
from .loads import not_counted
from .processes import run_together
from .statistics import ExpertStatistics, StatisticsError

MEMORY_GIB = 8.0  # for second moments, unless more is asked for


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    text: str = "",
    memory_gib: float = MEMORY_GIB,
    linears: Sequence[str] = (),
    **patterns: Any,
) -> ExpertStatistics:
    """Second moments of the inputs of all expert matrices on some text, without gradients, in evaluation mode.

    Every token counts that the router sends to an expert, with the square of its routing weight. Where an expert is
    called without its routing weight being seen, the weight counts as 1. Padding does not count where a batch marks it
    by an ``attention_mask`` of 0 and the experts are given all tokens of the batch; else it counts as the router
    counts it.

    With several processes (DDP, FSDP2) this is a collective: each process gives batches of its own, and all get the
    statistics of all batches. They stop together where the first has no more.

    Args:
        model: The float model; it is left as it was.
        batches: Keyword arguments of its forward pass, each a mapping; anything else is the only argument.
        text: What the text is, for the file.
        memory_gib: Memory for second moments, ``4 in**2`` bytes for each matrix. If those of all layers take more, the
            batches are gone through several times, for some layers each: see `passes`.
        linears: Names of other ``nn.Linear`` modules whose inputs are looked at too, each token counted once:
            `non_expert_linears` lists those that ``non_expert_bits`` quantizes.
        patterns: ``router_pattern`` and ``expert_pattern``, as in `find_moe_layers`.

    Raises:
        StatisticsError: The experts of a layer are called in a way that no hook sees, no token reaches them, one layer
            alone takes more than ``memory_gib``, or several passes are needed and ``batches`` is an iterator.

    Example:
        >>> import torch
        >>> statistics = collect_statistics(model, [{"input_ids": torch.arange(3, 100)[None]}])
        >>> plan = allocate(model, method="uniform", average_bits=2, group_size=64)
        >>> packed = quantize_model(model, plan, statistics=statistics)
    """
    forward = partial(run_batch, model)
    steps = (partial(forward, batch) for batch in batches) if isinstance(batches, Iterator) else Steps(forward, batches)
    layers = find_moe_layers(model, **patterns)
    return collect_from_steps(model, layers, steps, text=text, memory_gib=memory_gib, linears=linears)


class Steps:
    """Forward passes over batches, as often as they are asked for.

    Args:
        forward: Called with a batch.
        batches: Can be gone through more than once, such as a list or a data loader.
    """

    def __init__(self, forward: Callable[[Any], object], batches: Iterable[Any]) -> None:
        self._forward, self._batches = forward, batches

    def __iter__(self) -> Iterator[Callable[[], object]]:
        return (partial(self._forward, batch) for batch in self._batches)


def collect_from_steps(
    model: nn.Module,
    layers: list[MoELayer],
    steps: Iterable[Callable[[], object]],
    *,
    text: str = "",
    memory_gib: float = MEMORY_GIB,
    linears: Sequence[str] = (),
) -> ExpertStatistics:
    """`collect_statistics` of forward passes that the caller runs: each step is called once per pass, no gradients."""
    check_materialized(layers)
    groups = passes(layers, memory_gib, linear_widths(model, linears))
    if len(groups) > 1 and isinstance(steps, Iterator):
        raise StatisticsError(
            f"second moments of {len(layers)} layers take {memory_bytes(layers) / 2**30:.2f} GiB, which within "
            f"{memory_gib:g} GiB needs {len(groups)} passes over the batches, and these can be gone through only once: "
            "give a list or a data loader, or more memory (memory_gib)"
        )
    found = ExpertStatistics({layer.name: layer.shape for layer in layers}, text=text)
    device = layers[0].router_is.parameter().device
    with modes_kept(model), torch.no_grad(), not_counted():
        model.eval()
        for number, group in enumerate(groups, 1):
            which = f", pass {number} of {len(groups)}" if len(groups) > 1 else ""
            collector, others = Collector(model, group.layers), LinearCollector(model, group.linears)
            try:
                shown = tqdm(steps, desc=f"expert statistics{which}", unit="batch", leave=False, disable=None)
                run_together(shown, device, StatisticsError)
                collector.take(found)
                others.take(found.linears)
            finally:
                collector.close()
                others.close()
                _reshard(model)
    return found.belongs_to(layers)


@dataclass
class Group:
    """What is collected together.

    Attributes:
        layers: Layers of experts.
        linears: Name of another linear layer -> width of its input.
    """

    layers: list[MoELayer] = field(default_factory=list)
    linears: dict[str, int] = field(default_factory=dict)


def bytes_of(group: Group) -> int:
    """Bytes of the second moments of a group while they are collected."""
    return memory_bytes(group.layers) + sum(4 * width * width for width in group.linears.values())


def passes(layers: list[MoELayer], memory_gib: float, linears: Mapping[str, int] | None = None) -> list[Group]:
    """Layers, and other linear layers by name and width, in groups whose second moments fit into memory together.

    Raises:
        StatisticsError: Those of one layer do not.
    """
    groups = [Group()]
    everything = [(layer.name, Group([layer])) for layer in layers]
    everything += [(name, Group(linears={name: width})) for name, width in (linears or {}).items()]
    for name, one in everything:
        alone = bytes_of(one) / 2**30
        if alone > memory_gib:
            raise StatisticsError(
                f"second moments of layer {name!r} alone take {alone:.3g} GiB, more than the {memory_gib:g} GiB of "
                "memory_gib"
            )
        if (bytes_of(groups[-1]) + bytes_of(one)) / 2**30 > memory_gib:
            groups.append(Group())
        groups[-1].layers += one.layers
        groups[-1].linears |= one.linears
    return groups


def linear_widths(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Widths of the inputs of some ``nn.Linear`` modules, by their names.

    Raises:
        StatisticsError: One of them is something else, or not there.
    """
    modules = dict(root_model(model).named_modules())
    widths = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            found = "not there" if module is None else f"a {type(module).__name__}"
            raise StatisticsError(f"{name!r} is {found} in {type(model).__name__}, expected an nn.Linear")
        widths[name] = module.in_features
    return widths


def memory_bytes(layers: list[MoELayer]) -> int:
    """Bytes of the second moments of some layers while they are collected together."""
    return sum(4 * layer.num_experts * inp * inp for layer in layers for _, inp in layer.projections.values())


def peak_bytes(layers: list[MoELayer], memory_gib: float = MEMORY_GIB) -> int:
    """Bytes of the second moments that are in memory together at most; errors as those of `passes`."""
    return max(map(bytes_of, passes(layers, memory_gib)))


def _reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered in forward passes that no backward pass followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
