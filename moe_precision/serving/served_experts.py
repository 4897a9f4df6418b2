"""The packed experts of one layer that a process holds, and how they are filled from a checkpoint's tensors.

They are transformers' own expert module with our packed matrices in it, made as `from_pretrained` makes it, so layout,
activation and biases have one source. No float expert is ever made.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..quantize.modules import packed_experts_forward
from ..quantize.replace import Target, replace_weight
from .errors import ServingError


class ServedExperts(nn.Module):
    """The packed experts of one layer that this process holds, empty until `take` has got their tensors.

    Args:
        module: The layer's expert module, on the meta device; a copy is taken.
        targets: Its packed parameters.
        group_size: Weights that share a scale and an offset.
        held: Which experts this process holds, rising.
        device: Where they go.
    """

    places: Tensor

    def __init__(
        self, module: nn.Module, targets: Sequence[Target], group_size: int, held: Sequence[int], device: Any
    ) -> None:
        super().__init__()
        if unsaved := [name for name, _ in module.named_buffers()]:
            raise ServingError(f"{type(module).__name__} has the buffers {unsaved}, which would be left unset here")
        count = len(targets[0].bits)
        self.all_bits = {target.name: target.bits for target in targets}
        parent = nn.Module()
        parent.experts = copy.deepcopy(module)
        for target in targets:
            own = replace(target, parameter=f"experts.{target.name}", bits=[target.bits[expert] for expert in held])
            replace_weight(parent, own, group_size, weight=None)
        experts: Any = parent.experts
        experts.num_experts = len(held)
        self._whole = {name: tuple(p.shape) for name, p in experts.named_parameters()}  # biases, norms
        self._by_expert = {name for name, shape in self._whole.items() if shape[0] == count and name.endswith("_bias")}
        for name in self._whole:  # as buffers: an engine looks for parameters in the files by itself
            *path, leaf = name.split(".")
            owner, own = experts.get_submodule(".".join(path)), experts.get_parameter(name).detach()
            delattr(owner, leaf)
            owner.register_buffer(leaf, own[list(held)] if name in self._by_expert else own)
        self.experts = experts.to_empty(device=device)
        places = torch.full((count,), -1, dtype=torch.int64)
        places[list(held)] = torch.arange(len(held))
        self.register_buffer("places", places.to(device), persistent=False)  # of each expert, -1: not in this process
        self.held = list(held)
        self._taken: set[str] = set()
        self._filled = False

    @torch.no_grad()
    def take(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor of the layer's experts, for all processes; keeps what belongs to the experts held here.

        Args:
            name: Its name below the expert module, for example ``packed.down_proj.bits_3.codes``.
            tensor: The tensor as the checkpoint holds it.

        Raises:
            ServingError: The plan has no such tensor, or one of another shape or dtype, or it has been taken already.
        """
        if name in self._taken:
            raise ServingError(
                f"{name!r} of one layer is in the checkpoint twice: another checkpoint lies beside it; delete its files"
            )
        if name in self.all_bits:
            self._check(name, tensor, (1,), None)  # the sentinel
        elif name in self._whole:
            self._check(name, tensor, self._whole[name], None)
            rows = tensor[self.held] if name in self._by_expert else tensor
            self.experts.get_buffer(name).copy_(rows)
        else:
            self._take_packed(name, tensor)
        self._taken.add(name)

    def _take_packed(self, name: str, tensor: Tensor) -> None:
        found = re.fullmatch(r"packed\.(\w+)\.bits_(\d+)\.(\w+)", name)
        widths = self.all_bits.get(found[1], []) if found else []
        width = int(found[2]) if found else -1
        experts = [expert for expert, bits in enumerate(widths) if bits == width]
        if found is None or not experts:
            raise ServingError(
                f"the checkpoint has a tensor {name!r} of packed experts, and its plan has no expert of this width and "
                "projection: config.json and weights are of different checkpoints; copy the folder again"
            )
        rows = [row for row, expert in enumerate(experts) if expert in self.held]
        if not rows:
            return
        bucket = self.experts.get_submodule(f"packed.{found[1]}.bits_{width}")
        if hasattr(bucket, "leave_kernel"):
            bucket.leave_kernel()
        own = dict(bucket.named_buffers(recurse=False)).get(found[3])
        if own is None:
            raise ServingError(f"a bucket of {width} bits has no {found[3]!r}: {name!r} is of another format")
        self._check(name, tensor, (len(experts), *own.shape[1:]), None if width == 16 else own.dtype)
        own.copy_(tensor[rows] if len(rows) < len(experts) else tensor)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        as_expected = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not as_expected:
            raise ServingError(
                f"{name!r} is {tuple(tensor.shape)} of {tensor.dtype}, expected {shape} of {dtype or 'a float dtype'}: "
                "config.json and weights are of different checkpoints; copy the folder again"
            )

    def check_complete(self, layer: str) -> None:
        """Raises `ServingError` unless every tensor that the plan asks for was taken since the last check."""
        expected = {*self.all_bits, *self._whole}
        for projection, widths in self.all_bits.items():
            for width in {*widths} - {0}:
                kinds = ("matrices",) if width == 16 else ("codes", "scale", "offset", "ends")
                expected |= {f"packed.{projection}.bits_{width}.{kind}" for kind in kinds}
        missing = sorted(expected - self._taken)
        if missing:
            raise ServingError(
                f"layer {layer!r}: {len(missing)} tensors of its packed experts did not arrive, {missing[0]!r} the "
                "first. The checkpoint is incomplete, or the engine reads weights in a way that passes the plugin by: "
                "use its default load format"
            )
        self._taken, self._filled = set(), True

    def check_filled(self, layer: str) -> None:
        """Raises `ServingError` unless `check_complete` has passed once."""
        if not self._filled:
            self.check_complete(layer)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what the experts that are held here make of each token; 0 for those held elsewhere.

        Args:
            x: ``(S, H)``.
            ids: ``(S, k)`` of any integer dtype: experts of the layer, below 0 for none.
            weights: ``(S, k)``.

        Returns:
            ``(S, H)`` in the dtype of ``x``.
        """
        places = self.places[ids.clamp(min=0).long()].masked_fill(ids < 0, -1)
        found: Tensor = packed_experts_forward(self.experts, x, places, weights)
        return found
