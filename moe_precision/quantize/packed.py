"""Modules that hold packed weights: equal matrices of one width, one projection of all experts, one linear layer.

Where a packed weight takes the place of a parameter, a one-element tensor stays under the parameter's name. A loader
that does not know this format then fails on its shape instead of filling the experts with random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .fitting import Fit, quantize_matrix
from .packing import pack


class PackedMatrices(nn.Module):
    """``count`` matrices of one shape and one width below 16 bits.

    Buffers: ``codes`` ``(count, out, in * bits / 8)`` uint8; ``scale`` and ``offset`` ``(count, out, in / group)``
    float16, which keep their dtype when the model is cast.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, count: int, out: int, inp: int, bits: int, group_size: int, device: Any = None) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        groups = (count, out, inp // group_size)
        self.register_buffer("codes", torch.empty(count, out, inp * bits // 8, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(groups, dtype=torch.float16, device=device))
        self.register_buffer("offset", torch.empty(groups, dtype=torch.float16, device=device))
        self._int4: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, index: int, weight: Tensor, fit: Fit = quantize_matrix) -> None:
        """Quantizes ``weight`` ``(out, in)`` into place ``index``."""
        codes, scale, offset = fit(weight, self.bits, self.group_size)
        self.codes[index], self.scale[index], self.offset[index] = pack(codes, self.bits), scale, offset
        self._int4.pop(index, None)

    def weight(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float matrix at ``index``, ``(out, in)``."""
        return kernels.dequantize(self.codes[index], self.scale[index], self.offset[index], self.bits, dtype)

    def linear(self, index: int, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` ``(..., in)``; gradients flow to ``x``."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self, index)
        return self.product(index, x)

    def product(self, index: int, x: Tensor) -> Tensor:
        """The same without gradients, by the fastest kernel that fits."""
        if not kernels.int4_fits(x, self.codes.shape[1], self.bits, self.group_size):
            return kernels.linear(x, self.codes[index], self.scale[index], self.offset[index], self.bits)
        if index not in self._int4:
            parts = (self.codes[index], self.scale[index], self.offset[index])
            self._int4[index] = kernels.to_int4(*parts, self.bits)
        return kernels.linear_int4(x, *self._int4[index], self.group_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrices:
        exact = self.scale, self.offset
        super()._apply(fn, recurse)
        self._int4.clear()
        if self.scale.dtype != torch.float16:  # a cast of the model: move only
            self.scale, self.offset = (tensor.to(self.codes.device) for tensor in exact)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._int4.clear()
        super()._load_from_state_dict(*args, **kwargs)


class _Product(torch.autograd.Function):
    """``x @ W.T`` with a packed W, which is dequantized anew for the backward pass: nothing in float is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: PackedMatrices, index: int) -> Tensor:
        ctx.matrices, ctx.index = matrices, index
        return matrices.product(index, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.matrices.weight(ctx.index, gradient.dtype), None, None


class DenseMatrices(nn.Module):
    """``count`` matrices that are left as they are: the 16-bit experts of a layer whose others are packed."""

    matrices: Tensor

    def __init__(self, count: int, out: int, inp: int, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.register_buffer("matrices", torch.empty(count, out, inp, dtype=dtype, device=device))

    def put(self, index: int, weight: Tensor, fit: Fit = quantize_matrix) -> None:
        """Copies ``weight`` ``(out, in)`` into place ``index``."""
        self.matrices[index] = weight

    def weight(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix at ``index``, ``(out, in)``."""
        return self.matrices[index].to(dtype)

    def linear(self, index: int, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` ``(..., in)``."""
        return F.linear(x, self.matrices[index])


class PackedProjection(nn.Module):
    """One projection of all experts of a layer, bucketed by width: children ``bits_2``, ``bits_3``, ...

    Args:
        bits: Width of each expert.
        shape: ``(out, in)`` of each matrix.
        group_size: Weights that share a scale and an offset.
        dtype: Dtype of the experts that stay at 16 bits.
    """

    def __init__(
        self, bits: list[int], shape: tuple[int, int], group_size: int, dtype: torch.dtype, device: Any = None
    ) -> None:
        super().__init__()
        self._place: list[tuple[str, int]] = []  # expert -> (bucket, index in it)
        counts: dict[int, int] = {}
        for width in bits:
            self._place.append((f"bits_{width}", counts.get(width, 0)))
            counts[width] = counts.get(width, 0) + 1
        for width in sorted(counts):
            bucket = (
                DenseMatrices(counts[width], *shape, dtype=dtype, device=device)
                if width == 16
                else PackedMatrices(counts[width], *shape, bits=width, group_size=group_size, device=device)
            )
            self.add_module(f"bits_{width}", bucket)

    def put(self, expert: int, weight: Tensor, fit: Fit = quantize_matrix) -> None:
        """Quantizes ``weight`` ``(out, in)`` as the matrix of ``expert``."""
        bucket, index = self._place[expert]
        self.get_submodule(bucket).put(index, weight, fit)  # type: ignore[operator]

    def weight(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float matrix of ``expert``, ``(out, in)``."""
        bucket, index = self._place[expert]
        return self.get_submodule(bucket).weight(index, dtype)  # type: ignore[operator]

    def linear(self, expert: int, x: Tensor) -> Tensor:
        """``x @ W.T`` with the matrix of ``expert``, ``x`` ``(tokens, in)``."""
        bucket, index = self._place[expert]
        return self.get_submodule(bucket).linear(index, x)  # type: ignore[operator]


class PackedLinear(nn.Module):
    """Takes the place of an ``nn.Linear``; ``weight`` is the one-element sentinel, which also carries the dtype."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = PackedMatrices(1, self.out_features, self.in_features, bits, group_size, device)
        self.register_buffer("weight", sentinel(linear.weight.dtype, device))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        y = self.packed.linear(0, x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.packed.bits}"


def sentinel(dtype: torch.dtype, device: Any = None) -> Tensor:
    """What stays under the name of a packed parameter: shape ``(1,)``, which no float loader accepts."""
    return torch.zeros(1, dtype=dtype, device=device)


def packed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function for modules whose projections are packed; one expert at a time.

    Args:
        self: The experts module, with ``packed`` holding a `PackedProjection` for each projection.
        hidden_states: ``(S, H)``.
        top_k_index: ``(S, k)`` expert indices; an index >= num_experts means "not here".
        top_k_weights: ``(S, k)``.

    Returns:
        ``(S, H)``.
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    out = torch.zeros_like(hidden_states)
    experts, order = top_k_index.flatten().sort(stable=True)  # (S * k,)
    counts = experts.bincount(minlength=self.num_experts).tolist()  # the only host sync
    token_of, weight_of = order // top_k_index.shape[1], top_k_weights.flatten()[order]
    start = 0
    for expert, count in enumerate(counts[: self.num_experts]):
        if count == 0:
            continue
        chosen = slice(start, start + count)
        start += count
        tokens = token_of[chosen]
        hidden = self.packed[first].linear(expert, hidden_states[tokens])
        if self.has_bias:
            hidden = hidden + getattr(self, f"{first}_bias")[expert]
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        result = self.packed["down_proj"].linear(expert, hidden)
        if self.has_bias:
            result = result + self.down_proj_bias[expert]
        if getattr(self, "has_post_expert_norm", False):
            result = self.post_expert_norm(result)
        out.index_add_(0, tokens, (result * weight_of[chosen, None]).to(out.dtype))
    return out
