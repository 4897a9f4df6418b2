"""Modules that hold packed weights: equal matrices of one width, one projection of all experts, one linear layer.

Where a packed weight takes the place of a parameter, a one-element tensor stays under the parameter's name. A loader
that does not know this format then fails on its shape instead of filling the experts with random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from transformers.integrations.moe import _grouped_linear

from . import kernels
from .codec.fitting import Fit, quantize_matrix
from .codec.packing import pack
from .codec.scales import blocks_of
from .kernels import Kernel, Matrices, grouped


class PackedMatrices(nn.Module):
    """``count`` matrices of one shape and one width below 16 bits.

    They are in memory once: as the checkpoint holds them, or, from the first product on, in the form of the kernel that
    multiplies them (`kernels.choose`). Saving, casting and moving go back to the first form, bit for bit.

    Buffers: those of `kernels.Matrices`; ``ends`` keeps its dtype when the model is cast.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    ends: Tensor
    kernel: Kernel | None

    def __init__(self, count: int, out: int, inp: int, bits: int, group_size: int, device: Any = None) -> None:
        super().__init__()
        self.shape = count, out, inp
        self.bits, self.group_size = bits, group_size
        groups = inp // group_size
        self.register_buffer("codes", torch.empty(count, out, inp * bits // 8, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(count, out, groups, dtype=torch.uint8, device=device))
        self.register_buffer("offset", torch.empty(count, out, groups, dtype=torch.uint8, device=device))
        ends = torch.empty(count, blocks_of(out, groups), 4, dtype=torch.float16, device=device)
        self.register_buffer("ends", ends)
        self.register_module("kernel", None)
        self._chosen_for: kernels.Request | None = None

    def put(self, index: int, weight: Tensor, fit: Fit = quantize_matrix) -> None:
        """Quantizes ``weight`` ``(out, in)`` into place ``index``.

        Raises:
            ValueError: The fit gives scales or offsets that cannot be stored as they are.
        """
        self.leave_kernel()
        codes, scale, offset = fit(weight, self.bits, self.group_size)
        for held, new in zip(self.held(), Matrices.of(pack(codes, self.bits), scale, offset), strict=True):
            held[index] = new

    def held(self) -> Matrices:
        """All matrices as the checkpoint holds them, where no kernel has another form of them."""
        return Matrices(self.codes, self.scale, self.offset, self.ends)

    def matrices(self, indices: list[int]) -> Matrices:
        """Some matrices as the checkpoint holds them."""
        if self.kernel is not None:
            parts = zip(*(self.kernel.matrix(index) for index in indices), strict=True)
            return Matrices(*(torch.cat(part) for part in parts))
        return Matrices(*(held[indices] for held in self.held()))

    def weights(self, indices: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Some float matrices, ``(len(indices), out, in)``."""
        if self.kernel is not None:
            return torch.stack([self.kernel.float_matrix(index) for index in indices]).to(dtype)
        some = self.matrices(indices)
        return kernels.dequantize(some.codes, *some.floats(), self.bits, dtype)

    def weight(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float matrix at ``index``, ``(out, in)``."""
        return self.weights([index], dtype)[0]

    @torch.compiler.disable
    def linear(self, index: int, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` ``(..., in)``; gradients flow to ``x``."""
        self._check(x)
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self, index)
        return self.product(index, x)

    def product(self, index: int, x: Tensor, training: bool = False) -> Tensor:
        """The same without gradients, by the kernel that fits."""
        self._enter_kernel(self.request(x.device, x.dtype, training))
        if self.kernel is not None:
            return self.kernel.linear(index, x)
        one = Matrices(*(held[index : index + 1] for held in self.held()))
        if grouped.fits(x, one):
            return grouped.linear(x, one, self.bits, self.group_size)
        return F.linear(x, self.weight(index, x.dtype))

    def grouped(self, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor) -> None:
        """See `Kernel.grouped`; gradients flow from ``y`` to ``x``."""
        self._check(x)
        if grouped.fits(x, self.held()):
            grouped.multiply(x, starts, experts, self.held(), self.bits, self.group_size, y)
            return
        differentiated = x.requires_grad and torch.is_grad_enabled()
        if not differentiated:
            self._enter_kernel(self.request(x.device, x.dtype))
        if self.kernel is None or differentiated:
            _multiply_rows(self, x, starts, experts, y, together=x.device.type != "cpu")
        else:
            self.kernel.grouped(x, starts, experts, y)

    def _check(self, x: Tensor) -> None:
        _check_plain(x)
        if x.shape[-1] != self.shape[2]:
            raise ValueError(f"got rows of width {x.shape[-1]}, expected {self.shape[2]}, that of the packed matrices")

    def request(self, device: torch.device, dtype: torch.dtype, training: bool = False) -> kernels.Request:
        """What a kernel would have to do for activations of this kind."""
        return kernels.Request(device.type, dtype, training, self.bits, *self.shape[1:], self.group_size)

    def _enter_kernel(self, request: kernels.Request) -> None:
        if self._chosen_for is not None and self._chosen_for.training:  # forward and backward take turns
            request = request._replace(training=True)
        if request != self._chosen_for:
            with _plain():
                self._change_kernel(request)

    def _change_kernel(self, request: kernels.Request) -> None:
        choice = kernels.choose(request)
        if choice is None or type(self.kernel) is not choice:
            self.leave_kernel()
        if choice is not None and self.kernel is None:
            self.kernel = choice(self.held(), self.bits, self.group_size)
            self.codes = self.scale = self.offset = self.ends = None  # type: ignore[assignment]
        self._chosen_for = request

    def leave_kernel(self) -> None:
        """Back to the form of the checkpoint; the next product chooses again."""
        if self.kernel is not None:
            with _plain():
                self.codes, self.scale, self.offset, self.ends = self.matrices(list(range(self.shape[0])))
            self.kernel = None
        self._chosen_for = None

    def __getstate__(self) -> dict[str, Any]:
        self.leave_kernel()  # the form of a kernel may be another on the CPU that unpickles it
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrices:
        self.leave_kernel()
        exact = self.ends
        super()._apply(fn, recurse)
        if self.ends.dtype != torch.float16:  # a cast of the model: move only
            self.ends = exact.to(self.codes.device)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.leave_kernel()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.leave_kernel()
        super()._load_from_state_dict(*args, **kwargs)


def _check_plain(x: Tensor) -> None:
    """Kernels take addresses, which other tensors do not have, or which do not say all."""
    if type(x) not in (Tensor, nn.Parameter) or unpack_dual(x).tangent is not None:
        raise TypeError(f"packed matrices multiply plain tensors, got {type(x).__name__}: {x!r:.80}")


@contextmanager
def _plain() -> Iterator[None]:
    """Whatever the caller's modes: what is made here outlives them. Kernels are on CPUs."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


class _Product(torch.autograd.Function):
    """``x @ W.T`` with a packed W, which is dequantized anew for the backward pass: nothing in float is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: PackedMatrices, index: int) -> Tensor:
        ctx.matrices, ctx.index = matrices, index
        return matrices.product(index, x, training=True)

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

    def weights(self, indices: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Some of the matrices, ``(len(indices), out, in)``."""
        return self.matrices[indices].to(dtype)

    def linear(self, index: int, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` ``(..., in)``."""
        return F.linear(x, self.matrices[index])

    def grouped(self, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor) -> None:
        """See `Kernel.grouped`; gradients flow from ``y`` to ``x``."""
        _multiply_rows(self, x, starts, experts, y, together=x.device.type != "cpu")


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
        self.out = shape[0]
        self._place: list[tuple[str, int]] = []  # expert -> (bucket, index in it)
        self._experts: dict[str, list[int]] = {f"bits_{width}": [] for width in sorted(set(bits))}  # and back
        for expert, width in enumerate(bits):
            experts = self._experts[f"bits_{width}"]
            self._place.append((f"bits_{width}", len(experts)))
            experts.append(expert)
        for width in sorted(set(bits)):
            count = len(self._experts[f"bits_{width}"])
            bucket = (
                DenseMatrices(count, *shape, dtype=dtype, device=device)
                if width == 16
                else PackedMatrices(count, *shape, bits=width, group_size=group_size, device=device)
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

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """Each row times the matrix of its expert.

        Args:
            x: ``(rows, in)``, those of expert 0 first.
            starts: ``(experts + 1,)`` int64: where the rows of each expert begin, and where those of all end.

        Returns:
            ``(rows, out)``; 0 in rows that are no expert's.

        Raises:
            ValueError: ``starts`` is not what it should be (on a GPU its values are not looked at).
            TypeError: ``x`` is not a tensor in memory: a fake or distributed one, or one with a forward derivative.
        """
        _check_plain(x)
        if starts.dtype != torch.int64 or starts.shape != (len(self._place) + 1,):
            raise ValueError(
                f"starts is {tuple(starts.shape)} of {starts.dtype}, expected ({len(self._place) + 1},) of torch.int64"
            )
        if x.device.type == "cpu" and not 0 <= int(starts[0]) <= int(starts[-1]) <= len(x):
            raise ValueError(f"starts goes from {int(starts[0])} to {int(starts[-1])}, but there are {len(x)} rows")
        y = x.new_zeros(len(x), self.out)
        for bucket, experts in self._experts.items():
            self.get_submodule(bucket).grouped(x, starts, _indices(tuple(experts), x.device), y)  # type: ignore[operator]
        return y


def _multiply_rows(
    matrices: PackedMatrices | DenseMatrices, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor, together: bool
) -> None:
    """`Kernel.grouped` without a kernel: in one launch with float weights, or a product an expert."""
    used = kernels.spans(starts, experts)
    if not used:
        return
    rows = torch.cat([torch.arange(rows.start, rows.stop, device=x.device) for _, rows in used])
    counts, indices = [rows.stop - rows.start for _, rows in used], [index for index, _ in used]
    if together:
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        products = _grouped_linear(x.index_select(0, rows), matrices.weights(indices, x.dtype), ends)
    else:
        parts = zip(indices, x.index_select(0, rows).split(counts), strict=True)
        products = torch.cat([matrices.linear(index, part) for index, part in parts])
    y.index_copy_(0, rows, products.to(y.dtype))  # one step for autograd


@lru_cache(maxsize=4096)
def _indices(experts: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device once, so that no product waits for a copy."""
    with torch.inference_mode(False):
        return torch.tensor(experts, device=device)


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
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    result = self.packed["down_proj"](hidden, starts)
    if self.has_bias:
        result = result + self.down_proj_bias[biased]
    if getattr(self, "has_post_expert_norm", False):
        result = self.post_expert_norm(result)
    weights = top_k_weights.flatten()[order].masked_fill(experts != biased, 0)  # (S * k,)
    result = (result * weights.unsqueeze(1)).to(hidden_states.dtype)
    return torch.zeros_like(hidden_states).index_add_(0, tokens, result)


def kernels_of(model: nn.Module) -> dict[str, str]:
    """Which kernel multiplies the packed matrices of each module of a model.

    What has not been used yet is told for activations of the model's dtype, where the weights are now. On a GPU a
    product through which gradients flow is dequantized, whatever is said here.

    Returns:
        Module path -> for example ``"C++, 2 bits, 3 matrices of 4096 x 14336"``.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, DenseMatrices):
            count, out, inp = module.matrices.shape
            found[path] = f"float, {module.matrices.dtype}, {count} matrices of {out} x {inp}"
        if isinstance(module, PackedMatrices):
            count, out, inp = module.shape
            kernel: Kernel | type[Kernel] | None = module.kernel
            if module._chosen_for is None:
                kernel = kernels.choose(module.request(module.codes.device, dtype))
            by = kernel.name if kernel is not None else "dequantize"
            if module.codes is not None and module.codes.is_cuda and grouped.works(module.codes.device, dtype):
                by = "Triton"
            found[path] = f"{by}, {module.bits} bits, {count} matrices of {out} x {inp}"
    return found
