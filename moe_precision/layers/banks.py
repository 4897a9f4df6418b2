"""The matrices of a layer's experts, however they are stored, and the experts that they make up together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .expert_parallel import from_owner, local_counts, processes_of
from .module_tree import MoELayerError, Node, Weight, numbered_children


@dataclass(frozen=True, eq=False)
class Bank:
    """One matrix of every expert.

    Attributes:
        weights: One 3-D weight ``(E or more, ...)`` or one flat one ``(E * rows, columns)`` for all experts, or one
            matrix per expert.
        num_experts: ``E``.
        transposed: The weights hold ``(in, out)`` matrices.
        parts: Over how many processes the experts are split as plain tensors; ``weights`` are those of this one, and
            reading a matrix is a collective then.
    """

    weights: list[Weight]
    num_experts: int
    transposed: bool = False
    parts: int = 1

    @property
    def local(self) -> int:
        """How many experts this process holds."""
        return self.num_experts // self.parts

    @property
    def start(self) -> int:
        """Index of the first expert that this process holds."""
        return dist.get_rank() * self.local if self.parts > 1 else 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one expert's matrix."""
        first = self.weights[0].shape
        rows, columns = first[-2:]
        if len(self.weights) == 1 and len(first) == 2:
            rows //= self.local
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def stack(self) -> tuple[int, ...] | None:
        """``(E, rows, columns)`` of a flat bank, whose values are those of such a stack; None for other banks."""
        first = self.weights[0].shape
        flat = len(self.weights) == 1 and len(first) == 2
        return (self.local, first[0] // self.local, first[1]) if flat else None

    def read(self, expert: int) -> Tensor:
        """The matrix of one expert, ``(out, in)``, a detached view where the layout allows it."""
        if self.parts > 1:
            one = self._from_owner(expert)
        else:
            one = self.weights[expert].read() if len(self.weights) > 1 else self._slices()[expert]
        return one.detach().T if self.transposed else one.detach()

    def matrices(self) -> Iterator[Tensor]:
        """The matrices of all experts in order, as `read` gives them, but reading a bank only once."""
        if self.parts > 1:
            yield from (self.read(expert) for expert in range(self.num_experts))
            return
        slices = (weight.read() for weight in self.weights) if len(self.weights) > 1 else self._slices()
        for one in islice(slices, self.num_experts):
            yield one.detach().T if self.transposed else one.detach()

    def _from_owner(self, expert: int) -> Tensor:
        owner, place = divmod(expert, self.local)
        own = self.weights[place].read() if len(self.weights) > 1 else self._slices()[place]
        return from_owner(own, owner)

    def _slices(self) -> Tensor:
        bank = self.weights[0].read().detach()
        if isinstance(bank, DTensor):  # one bank at a time, on every rank
            bank = bank.full_tensor()
        return bank if self.stack is None else bank.view(self.stack)


@dataclass(frozen=True, eq=False)
class Experts:
    """All experts of one layer.

    Attributes:
        node: The module that holds them.
        num_experts: ``E``; 0 where a flat bank does not show it and only the router does.
        banks: Projection name -> its matrices.
        layout: ``fused``: slices of 3-D weights, as transformers' experts interface has them; ``flat``: blocks of rows
            of 2-D weights; ``modules``: one per expert; ``separate``: one weight per expert, in one module.
        named: Their name says that they are experts, so it is an error if they have no router.
        oriented: A pattern or a layout's name has said which banks hold ``(in, out)`` matrices.
        parallel: The modules say that these are the experts of one process, of perhaps more.
    """

    node: Node
    num_experts: int
    banks: dict[str, Bank]
    layout: str
    named: bool
    oriented: bool = False
    parallel: bool = False

    @property
    def path(self) -> str:
        """Clean path of the module that holds them."""
        return self.node.path

    @property
    def template(self) -> str:
        """Path of one expert's module, ``{expert}`` in place of its index; `path` for fused experts, else empty."""
        if self.layout != "modules":
            return self.path if self.layout == "fused" else ""
        return re.sub(r"\d+$", "{expert}", numbered_children(self.node)[0].path)

    @property
    def identity(self) -> int:
        """Equal for experts that two modules share."""
        return id(next(iter(self.banks.values())).weights[0].parameter())

    @property
    def null_experts(self) -> int:
        """Slices of a bank beyond the experts, which the router has rows for; 0 for all but a few families."""
        slices = [bank.weights[0].shape[0] for bank in self.banks.values()] if self.layout == "fused" else []
        return max(slices, default=self.num_experts) - self.num_experts


def with_count(experts: Experts, num_experts: int) -> Experts:
    """Flat banks cut into as many experts as the router has rows.

    Raises:
        MoELayerError: The rows of a bank are not a multiple of it, or are those of the experts of one process.
    """
    fewer = any(0 < local < num_experts for local in local_counts(experts.node.module))
    for bank in experts.banks.values():
        (weight,) = bank.weights
        marked = getattr(weight.parameter(), "expert_model_parallel", False)  # by MegaBlocks
        if marked or (fewer and not isinstance(weight.parameter(), DTensor)):
            raise MoELayerError(
                f"{weight.name!r} holds the experts of one process, in a flat bank that does not tell how many: flat "
                "banks under expert parallelism cannot be recorded; train without it, or with experts that are DTensors"
            )
        if weight.shape[0] % num_experts:
            raise MoELayerError(f"{weight.name!r} has {weight.shape[0]} rows, not a multiple of {num_experts} experts")
    banks = {name: replace(bank, num_experts=num_experts) for name, bank in experts.banks.items()}
    return replace(experts, num_experts=num_experts, banks=banks)


def split_over(experts: Experts, path: str, rows: int) -> Experts:
    """Experts of one process of several as experts of all of them, where the router has rows for more.

    Args:
        experts: As they were found; their number is that of this process.
        path: Of the layer, for messages.
        rows: Rows of the router.

    Raises:
        MoELayerError: They are split over other processes than those that run together.
    """
    if not experts.parallel or rows <= experts.num_experts or rows % experts.num_experts:
        return experts
    parts = processes_of(path, experts.num_experts, rows)
    banks = {name: replace(bank, num_experts=rows, parts=parts) for name, bank in experts.banks.items()}
    return replace(experts, num_experts=rows, banks=banks)
