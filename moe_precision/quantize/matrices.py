"""Equal matrices of one width: packed below 16 bits, in the form of the kernel that multiplies them, or float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ..compat import grouped_linear
from . import kernels
from .codec.fitting import Fit, quantize_matrices
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
        self.exact = False  # activations are never rounded to int8
        groups = inp // group_size
        self.register_buffer("codes", torch.empty(count, out, inp * bits // 8, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(count, out, groups, dtype=torch.uint8, device=device))
        self.register_buffer("offset", torch.empty(count, out, groups, dtype=torch.uint8, device=device))
        ends = torch.empty(count, blocks_of(out, groups), 4, dtype=torch.float16, device=device)
        self.register_buffer("ends", ends)
        self.register_module("kernel", None)
        self._chosen_for: kernels.Request | None = None

    def put(self, indices: Sequence[int], weights: Tensor, fit: Fit = quantize_matrices) -> None:
        """Quantizes ``weights`` ``(N, out, in)`` into the places ``indices``.

        Raises:
            ValueError: The fit gives scales or offsets that cannot be stored as they are.
        """
        self.leave_kernel()
        codes, scale, offset = fit(weights, self.bits, self.group_size)
        for held, new in zip(self.held(), Matrices.of(pack(codes, self.bits), scale, offset), strict=True):
            held[list(indices)] = new

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
            found: Tensor = _Product.apply(x, self, index)
            return found
        return self.product(index, x)

    def product(self, index: int, x: Tensor, training: bool = False) -> Tensor:
        """``x @ W.T`` without gradients, by the kernel that fits."""
        self._enter_kernel(self.request(x.device, x.dtype, training))
        if self.kernel is not None:
            return self.kernel.linear(index, x)
        one = Matrices(*(held[index : index + 1] for held in self.held()))
        if grouped.fits(x, one):
            return grouped.linear(x, one, self.bits, self.group_size)
        return F.linear(x, self.weight(index, x.dtype))

    def kernel_for(self, x: Tensor) -> Kernel | None:
        """The kernel that multiplies rows ``x`` ``(rows, in)``; None if `grouped` does."""
        self._check(x)
        if x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
            return None
        self._enter_kernel(self.request(x.device, x.dtype))
        return self.kernel

    def grouped(self, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor) -> None:
        """Writes the products of rows that no kernel multiplies: see `Kernel.grouped`.

        Args:
            x: ``(rows, in)``; gradients flow to it from ``y``.
            starts: ``(experts of the layer + 1,)`` int64.
            experts: ``(count,)`` int64: whose matrices these are.
            y: ``(rows, out)``.
        """
        if grouped.fits(x, self.held()):
            grouped.multiply(x, starts, experts, self.held(), self.bits, self.group_size, y)
        else:
            multiply_rows(self, x, starts, experts, y, together=x.device.type != "cpu")

    def described(self, dtype: torch.dtype) -> str:
        """Kernel, width, number and shape, for activations of ``dtype`` if no kernel has been chosen yet."""
        kernel: Kernel | type[Kernel] | None = self.kernel
        if self._chosen_for is None:
            kernel = kernels.choose(self.request(self.codes.device, dtype))
        by = kernel.name if kernel is not None else "dequantize"
        if self.codes is not None and self.codes.is_cuda and grouped.works(self.codes.device, dtype):
            by = "Triton"
        count, out, inp = self.shape
        return f"{by}, {self.bits} bits, {count} matrices of {out} x {inp}"

    def _check(self, x: Tensor) -> None:
        check_plain(x)
        if x.shape[-1] != self.shape[2]:
            raise ValueError(f"got rows of width {x.shape[-1]}, expected {self.shape[2]} as the packed matrices have")

    def request(self, device: torch.device, dtype: torch.dtype, training: bool = False) -> kernels.Request:
        """What a kernel would have to compute for activations of this kind."""
        return kernels.Request(device.type, dtype, training, self.bits, *self.shape[1:], self.group_size, self.exact)

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
        """Goes back to the form of the checkpoint; the next product chooses again."""
        if self.kernel is not None:
            with _plain():
                self.codes, self.scale, self.offset, self.ends = self.matrices(list(range(self.shape[0])))
            self.kernel = None
        self._chosen_for = None

    def __getstate__(self) -> dict[str, Any]:
        self.leave_kernel()  # a kernel's form may differ on the CPU that unpickles it
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


def check_plain(x: Tensor) -> None:
    """Raises `TypeError` unless ``x`` is a plain tensor: kernels read memory, which other tensors lack or add to."""
    if type(x) not in (Tensor, nn.Parameter) or unpack_dual(x).tangent is not None:
        raise TypeError(f"packed matrices multiply plain tensors only, got {type(x).__name__}: {x!r:.80}")


@contextmanager
def _plain() -> Iterator[None]:
    """Turns the caller's modes off inside: what is made here outlives them. Kernels are on CPUs."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


class _Product(torch.autograd.Function):
    """``x @ W.T`` with a packed W, which is dequantized again for the backward pass: nothing in float is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: PackedMatrices, index: int) -> Tensor:
        ctx.matrices, ctx.index = matrices, index
        return matrices.product(index, x, training=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.matrices.weight(ctx.index, gradient.dtype), None, None


class _GroupedProduct(torch.autograd.Function):
    """`_Product` for several matrices in one launch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrices: PackedMatrices | DenseMatrices, indices: list[int], ends: Tensor
    ) -> Tensor:
        ctx.matrices, ctx.indices, ctx.ends = matrices, indices, ends
        return grouped_linear(x, matrices.weights(indices, x.dtype), ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weights = ctx.matrices.weights(ctx.indices, gradient.dtype).transpose(1, 2)
        return grouped_linear(gradient, weights, ctx.ends), None, None, None


class DenseMatrices(nn.Module):
    """``count`` matrices that are left as they are: the 16-bit experts of a layer whose others are packed."""

    matrices: Tensor

    def __init__(self, count: int, out: int, inp: int, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.shape = count, out, inp
        self.register_buffer("matrices", torch.empty(count, out, inp, dtype=dtype, device=device))

    def put(self, indices: Sequence[int], weights: Tensor, fit: Fit = quantize_matrices) -> None:
        """Copies ``weights`` ``(N, out, in)`` into the places ``indices``."""
        self.matrices[list(indices)] = weights.to(self.matrices.dtype)

    def weight(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix at ``index``, ``(out, in)``."""
        return self.matrices[index].to(dtype)

    def weights(self, indices: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Some of the matrices, ``(len(indices), out, in)``."""
        return self.matrices[indices].to(dtype)

    def described(self, dtype: torch.dtype) -> str:
        """Dtype, number and shape, in the words of `PackedMatrices.described`."""
        count, out, inp = self.matrices.shape
        return f"float, {self.matrices.dtype}, {count} matrices of {out} x {inp}"

    def linear(self, index: int, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` ``(..., in)``."""
        return F.linear(x, self.matrices[index])

    def kernel_for(self, x: Tensor) -> None:
        """None: `grouped` multiplies."""

    def grouped(self, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor) -> None:
        """See `PackedMatrices.grouped`."""
        multiply_rows(self, x, starts, experts, y, together=x.device.type != "cpu")


def multiply_rows(
    matrices: PackedMatrices | DenseMatrices, x: Tensor, starts: Tensor, experts: Tensor, y: Tensor, together: bool
) -> None:
    """`Kernel.grouped` without a kernel: in one launch with float weights, or one product per expert."""
    used = kernels.spans(starts, experts)
    if not used:
        return
    rows = torch.cat([torch.arange(rows.start, rows.stop, device="cpu") for _, rows in used]).to(x.device)
    counts, indices = [rows.stop - rows.start for _, rows in used], [index for index, _ in used]
    if together:
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        products = _GroupedProduct.apply(x.index_select(0, rows), matrices, indices, ends)
    else:
        parts = zip(indices, x.index_select(0, rows).split(counts), strict=True)
        products = torch.cat([matrices.linear(index, part) for index, part in parts])
    y.index_copy_(0, rows, products.to(y.dtype))  # one step for autograd
