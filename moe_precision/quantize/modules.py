"""Modules in place of float ones: one projection of all experts, bucketed by width, and one linear layer.

Where a packed weight replaces a parameter, a one-element tensor stays under the parameter's name. A loader
that does not know this format then fails on its shape instead of filling the experts with random numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..compat import apply_gate, experts_implementation
from .buckets import Bucket, bucket_of
from .codec.fitting import Fits, at_a_time, quantize_matrices
from .kernels import Kernel
from .matrices import PackedMatrices, check_plain

Activations = Literal["int8", "bfloat16"]
EXPERTS_IMPLEMENTATION = "moe_precision"  # under which transformers finds `packed_experts_forward`


class PackedProjection(nn.Module):
    """One projection of all experts of a layer, bucketed by width: children ``bits_2``, ``bits_3``, ...

    Args:
        bits: Width of each expert; the bucket ``bits_0`` of those that are dropped holds nothing.
        shape: ``(out, in)`` of each matrix.
        group_size: Weights that share a scale and an offset.
        dtype: Dtype of the experts that stay at 16 bits.
    """

    def __init__(
        self, bits: list[int], shape: tuple[int, int], group_size: int, dtype: torch.dtype, device: Any = None
    ) -> None:
        super().__init__()
        self.out = shape[0]
        self._experts = {
            f"bits_{width}": tuple(expert for expert, other in enumerate(bits) if other == width)
            for width in sorted(set(bits))
        }
        places = [(expert, name, index) for name, held in self._experts.items() for index, expert in enumerate(held)]
        self._place = [(name, index) for _, name, index in sorted(places)]  # of each expert: bucket, index in it
        for width in sorted(set(bits)):
            count = len(self._experts[f"bits_{width}"])
            self.add_module(f"bits_{width}", bucket_of(width, count, *shape, group_size, dtype, device))

    @property
    def num_experts(self) -> int:
        """How many experts it holds."""
        return len(self._place)

    def fill(self, weights: Tensor, fits: Fits = lambda experts: quantize_matrices) -> None:
        """Quantizes the matrices ``(E, out, in)`` of all experts; small ones of one width together."""
        for name, held in self._experts.items():
            bucket: Bucket = self.get_submodule(name)  # type: ignore[assignment]
            for indices in at_a_time(range(len(held)), bucket.shape[1:]):
                experts = held[indices[0] : indices[-1] + 1]
                some = weights[experts[0]].unsqueeze(0) if len(experts) == 1 else weights[list(experts)]
                bucket.put(indices, some, fits(experts))

    def place(self, expert: int) -> tuple[Bucket, int]:
        """Where the matrix of ``expert`` is held."""
        name, index = self._place[expert]
        bucket = self.get_submodule(name)
        assert isinstance(bucket, Bucket)
        return bucket, index

    def weight(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float matrix of ``expert``, ``(out, in)``."""
        bucket, index = self._place[expert]
        found: Tensor = self.get_submodule(bucket).weight(index, dtype)  # type: ignore[operator]
        return found

    def linear(self, expert: int, x: Tensor) -> Tensor:
        """``x @ W.T`` with the matrix of ``expert``, ``x`` ``(tokens, in)``."""
        bucket, index = self._place[expert]
        found: Tensor = self.get_submodule(bucket).linear(index, x)  # type: ignore[operator]
        return found

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """Each row times the matrix of its expert.

        Args:
            x: ``(rows, in)``, those of expert 0 first.
            starts: ``(experts + 1,)`` int64: where the rows of each expert begin, and where those of all end.

        Returns:
            ``(rows, out)``; 0 in rows that belong to no expert.

        Raises:
            ValueError: ``starts`` has a wrong shape, dtype or values (on a GPU values are not checked).
            TypeError: ``x`` is not a tensor in memory: a fake or distributed one, or one with a forward derivative.
        """
        check_plain(x)
        if starts.dtype != torch.int64 or starts.shape != (len(self._place) + 1,):
            raise ValueError(
                f"starts is {tuple(starts.shape)} of {starts.dtype}, expected ({len(self._place) + 1},) of torch.int64"
            )
        if x.device.type == "cpu":
            starts, known = starts.contiguous(), starts.tolist()
            if known[0] < 0 or known[-1] > len(x) or known != sorted(known):
                raise ValueError(
                    f"starts goes from {known[0]} to {known[-1]}, but there are {len(x)} rows; expected no value below "
                    "the one before it"
                )
        y = x.new_zeros(len(x), self.out)
        by_kernel: dict[type[Kernel], list[tuple[Kernel, Tensor]]] = {}
        for name, experts in self._experts.items():
            bucket, indices = self._modules[name], _indices(experts, x.device)
            kernel = bucket.kernel_for(x)  # type: ignore[union-attr, operator]
            if kernel is None:
                bucket.grouped(x, starts, indices, y)  # type: ignore[union-attr, operator]
            else:
                by_kernel.setdefault(type(kernel), []).append((kernel, indices))
        for kind, buckets in by_kernel.items():
            kind.grouped(buckets, x, starts, y)
        if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            y = y + x[:0].sum()  # 0: no row belongs to an expert, and the result has a graph all the same
        return y


@lru_cache(maxsize=4096)
def _indices(experts: tuple[int, ...], device: torch.device) -> Tensor:
    """The indices on the device, copied once, so that no product waits for a copy."""
    with torch.inference_mode(False):
        return torch.tensor(experts, device=device)


class PackedLinear(nn.Module):
    """Replaces an ``nn.Linear``; ``weight`` is the one-element sentinel, which also carries the dtype."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dtype = linear.weight.dtype
        self.packed = bucket_of(bits, 1, self.out_features, self.in_features, group_size, dtype, device)
        self.register_buffer("weight", sentinel(dtype, device))
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        y = self.packed.linear(0, x)
        found: Tensor = y if self.bias is None else y + self.bias
        return found

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.packed.bits}"


def sentinel(dtype: torch.dtype, device: Any = None) -> Tensor:
    """What stays under the name of a packed parameter: shape ``(1,)``, which no float loader accepts."""
    return torch.zeros(1, dtype=dtype, device=device)


def check_implementation(experts: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of packed experts: any other function than ours would multiply by sentinels.

    Raises:
        RuntimeError: The model's experts implementation is another one.
    """
    found = experts_implementation(experts)
    if found != EXPERTS_IMPLEMENTATION:
        raise RuntimeError(
            f"the experts are packed and run with experts_implementation={EXPERTS_IMPLEMENTATION!r} only, not with "
            f"{found!r}: call model.set_experts_implementation({EXPERTS_IMPLEMENTATION!r}), or make the model float "
            "with moe_precision.dequantize_model(model)"
        )


@torch.compiler.disable
def packed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function for modules whose projections are packed.

    Args:
        self: The experts module, with ``packed`` holding a `PackedProjection` for each projection.
        hidden_states: ``(S, H)``.
        top_k_index: ``(S, k)`` expert indices; one below 0 or >= num_experts means "not here".
        top_k_weights: ``(S, k)``.

    Returns:
        ``(S, H)``.
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    experts, order = top_k_index.flatten().sort(stable=True)  # (S * k,)
    starts = torch.searchsorted(experts, torch.arange(self.num_experts + 1, dtype=experts.dtype, device=experts.device))
    tokens = order // top_k_index.shape[1]
    biased = experts.clamp(0, self.num_experts - 1)  # whose bias
    hidden = self.packed[first](hidden_states[tokens], starts)
    if self.has_bias:
        hidden = hidden + getattr(self, f"{first}_bias")[biased]
    hidden = apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)
    result = self.packed["down_proj"](hidden, starts)
    if self.has_bias:
        result = result + self.down_proj_bias[biased]
    if getattr(self, "has_post_expert_norm", False):
        result = self.post_expert_norm(result)
    weights = top_k_weights.flatten()[order].masked_fill(experts != biased, 0)  # (S * k,)
    result = (result * weights.unsqueeze(1)).to(hidden_states.dtype)
    return torch.zeros_like(hidden_states).index_add_(0, tokens, result)


def set_activations(model: nn.Module, activations: Activations) -> None:
    """Says how a packed model's products on a CPU see 16-bit activations; takes effect with the next product.

    Args:
        model: A packed model.
        activations: ``int8``, as a packed model does by itself: at 1 to 4 bits they are rounded to whole steps of a
            127th of the largest one of each group, an error of 0.7 % of a product where the weights' own is 8 % or
            more, for products that take a half to three quarters of the time. ``bfloat16``: they are as they are.

    Raises:
        ValueError: Another value, or nothing in the model is packed.

    Example:
        >>> packed = quantize_model(model.bfloat16(), allocate(model, method="uniform", average_bits=2, group_size=64))
        >>> set_activations(packed, "bfloat16")
        >>> sorted({text.split(",")[0] for text in packed.moe_precision_kernels().values()})
        ['C++']
    """
    if activations not in get_args(Activations):
        raise ValueError(f"activations={activations!r}: expected one of {', '.join(get_args(Activations))}")
    buckets = [module for module in model.modules() if isinstance(module, PackedMatrices)]
    if not buckets:
        raise ValueError(f"nothing in this {type(model).__name__} is packed: its activations are as they are")
    for bucket in buckets:
        bucket.exact = activations != "int8"
        bucket.leave_kernel()  # so that what is reported is what the next product takes


def kernels_of(model: nn.Module) -> dict[str, str]:
    """Which kernel multiplies the packed matrices of each module of a model.

    Modules that have not been used yet report the kernel that they would get for activations of the model's dtype,
    where their weights are now. On a GPU a product through which gradients flow is dequantized, whatever this reports.

    Returns:
        Module path -> for example ``"C++, 2 bits, 3 matrices of 4096 x 14336"``.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    buckets = {path: m for path, m in model.named_modules() if isinstance(m, Bucket)}
    return {path: bucket.described(dtype) for path, bucket in buckets.items()}
