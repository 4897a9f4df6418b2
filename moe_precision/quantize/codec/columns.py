"""What goes column by column in rounding: each code waits for those before it, in a block of few columns.

On a CPU this is C++, compiled at its first use (`columns.cpp`); on a GPU, and where there is no compiler, torch. Both
do the same operations in the same order and give the same bits. Products with whole matrices are torch's on either way;
on another device, or with another number of threads or rows, they are summed in another order, and codes that are about
half way between two may differ.

All matrices are transposed, ``(in, out)``, and contiguous.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.compiler import compiled

_SOURCE = Path(__file__).with_name("columns.cpp")
_RIDGE = 1e-3
_FLAGS = ("-ffp-contract=off",)  # a fused product and sum is not what torch gives


class Grid(NamedTuple):
    """Scales and offsets ``(in / group, out)`` float32, the inverse of the scales, 0 for 0, and the largest code."""

    scale: Tensor
    offset: Tensor
    inverse: Tensor
    top: int

    @classmethod
    def of(cls, scale: Tensor, offset: Tensor, bits: int) -> Grid:
        """The grid of scales and offsets at a width."""
        return cls(scale, offset, inverse_of(scale), 2**bits - 1)

    def clone(self) -> Grid:
        """One that can be changed."""
        return Grid(self.scale.clone(), self.offset.clone(), self.inverse.clone(), self.top)


def inverse_of(scale: Tensor) -> Tensor:
    """One over the scale; 0 for a constant group."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def round_columns(weight: Tensor, left: Tensor, factor: Tensor, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounds a block of columns one after the other; each makes good what those before it have changed.

    Args:
        weight: ``(columns, out)`` float32.
        left: The same, and what it has to make good for columns before the block. It may be overwritten.
        factor: ``(columns, columns)``, rows of a larger matrix: how much of the error of a column, in its row, is made
            good by each that follows.
        groups: ``(columns,)`` int64, the group of each column.
        grid: Of the whole matrix.

    Returns:
        Codes, and errors (the quantized value less the weight), both ``(columns, out)`` float32.
    """
    built = library() if weight.device.type == "cpu" else None
    if built is None:
        return _round(weight, left, factor, groups, grid)
    return _round_compiled(built, weight, left, factor, groups, grid)


def fit_columns(
    weight: Tensor,
    codes: Tensor,
    errors: Tensor,
    slope: Tensor,
    moment: Tensor,
    grid: Grid,
    group: int,
    ridge: float = _RIDGE,
) -> Tensor:
    """Least squares under the second moment for one group's scale and offset, while the other groups stay.

    A scale and offset stay where the new scale would not be positive, or more than three times as large.

    Args:
        weight: The group's columns, ``(group, out)`` float32.
        codes: The same shape.
        errors: The same shape: quantized values less the weight, changed in place.
        slope: The same shape: the second moment times the errors of all columns.
        moment: ``(group, group)`` float32, symmetric.
        grid: Of the whole matrix, changed in place.
        group: Which group.
        ridge: Shortens the step; 0 for the least squares.

    Returns:
        The change of the errors, ``(group, out)``.
    """
    by_code, ones = moment @ codes, moment.sum() * (1 + ridge)
    built = library() if codes.device.type == "cpu" else None
    if built is None:
        return _fit(weight, codes, errors, slope, by_code, ones, grid, group, ridge)
    return _fit_compiled(built, weight, codes, errors, slope, by_code, ones, grid, group, ridge)


def move_columns(
    codes: Tensor, slope: Tensor, moment: Tensor, per_square: Tensor, scale: Tensor, inverse: Tensor, top: int
) -> Tensor:
    """Moves the codes of a block of columns of one group, one after the other, to their best values.

    Args:
        codes: ``(columns, out)`` float32, changed in place.
        slope: The same shape: half of the derivative of the error.
        moment: ``(columns, columns)``, rows of a larger matrix.
        per_square: ``(columns,)``: one over its diagonal; 0 where a code stays.
        scale: ``(out,)``, of the group.
        inverse: ``(out,)``, see `inverse_of`.
        top: The largest code.

    Returns:
        The change of the values, ``(columns, out)``.
    """
    built = library() if codes.device.type == "cpu" else None
    if built is None:
        return _move(codes, slope, moment, per_square, scale, inverse, top)
    return _move_compiled(built, codes, slope, moment, per_square, scale, inverse, top)


def _round(weight: Tensor, left: Tensor, factor: Tensor, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    codes, errors, products = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)
    for index, group in enumerate(groups.tolist()):
        torch.sub(left[index], grid.offset[group], out=codes[index])
        code = codes[index].mul_(grid.inverse[group]).round_().clamp_(0, grid.top)
        value = torch.mul(code, grid.scale[group]).add_(grid.offset[group])
        torch.sub(value, weight[index], out=errors[index])
        rest = slice(index + 1, None)
        left[rest].sub_(torch.mul(factor[rest, index, None], errors[index], out=products[rest]))
    return codes, errors


def _fit(
    weight: Tensor,
    codes: Tensor,
    errors: Tensor,
    slope: Tensor,
    by_code: Tensor,
    ones: Tensor,
    grid: Grid,
    group: int,
    ridge: float,
) -> Tensor:
    square, mixed, by_scale, by_offset = torch.zeros(4, codes.shape[1], dtype=torch.float32, device=codes.device)
    product = torch.empty_like(square)
    for index, code in enumerate(codes):  # one after the other: a sum in one call has an order of its own
        square += torch.mul(by_code[index], code, out=product)
        mixed += by_code[index]
        by_scale += torch.mul(slope[index], code, out=product)
        by_offset += slope[index]
    square *= 1 + ridge
    scale, offset = grid.scale[group], grid.offset[group]
    determinant = square * ones - mixed * mixed
    wider = scale + (mixed * by_offset - by_scale * ones) / determinant
    higher = offset + (mixed * by_scale - square * by_offset) / determinant
    taken = (determinant > square * ones * 1e-6) & (wider > 0) & (wider <= scale * 3)
    scale.copy_(torch.where(taken, wider, scale))
    offset.copy_(torch.where(taken, higher, offset))
    grid.inverse[group] = inverse_of(scale)
    after = torch.mul(codes, scale).add_(offset).sub_(weight)
    change = after - errors
    errors.copy_(after)
    return change


def _move(
    codes: Tensor, slope: Tensor, moment: Tensor, per_square: Tensor, scale: Tensor, inverse: Tensor, top: int
) -> Tensor:
    moved, products, slope = torch.empty_like(codes), torch.empty_like(codes), slope.clone()
    for index, old in enumerate(codes):
        step = torch.mul(slope[index], per_square[index]).mul_(inverse)
        code = torch.sub(old, step, out=step).round_().clamp_(0, top)
        torch.sub(code, old, out=moved[index]).mul_(scale)
        old.copy_(code)
        rest = slice(index + 1, None)
        slope[rest].add_(torch.mul(moment[rest, index, None], moved[index], out=products[rest]))
    return moved


def _round_compiled(
    built: ctypes.CDLL, weight: Tensor, left: Tensor, factor: Tensor, groups: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    weight, left = weight.contiguous(), left.contiguous()
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    scales = (tensor.data_ptr() for tensor in (grid.scale, grid.offset, grid.inverse))
    matrix = factor.data_ptr(), factor.stride(0)
    built.round_columns(
        *(torch.get_num_threads(), *weight.shape, weight.data_ptr(), left.data_ptr(), *matrix, groups.data_ptr()),
        *(*scales, grid.top, codes.data_ptr(), errors.data_ptr()),
    )
    return codes, errors


def _fit_compiled(
    built: ctypes.CDLL,
    weight: Tensor,
    codes: Tensor,
    errors: Tensor,
    slope: Tensor,
    by_code: Tensor,
    ones: Tensor,
    grid: Grid,
    group: int,
    ridge: float,
) -> Tensor:
    change, by_code, slope = torch.empty_like(codes), by_code.contiguous(), slope.contiguous()
    matrices = (tensor.data_ptr() for tensor in (codes, by_code, slope, weight))
    scales = (tensor[group].data_ptr() for tensor in (grid.scale, grid.offset, grid.inverse))
    built.fit_columns(
        *(torch.get_num_threads(), *codes.shape, *matrices, float(ones), 1 + ridge),
        *(*scales, errors.data_ptr(), change.data_ptr()),
    )
    return change


def _move_compiled(
    built: ctypes.CDLL,
    codes: Tensor,
    slope: Tensor,
    moment: Tensor,
    per_square: Tensor,
    scale: Tensor,
    inverse: Tensor,
    top: int,
) -> Tensor:
    assert codes.is_contiguous(), "codes are changed in place"
    slope, moved = slope.contiguous(), torch.empty_like(codes)
    scales = (tensor.data_ptr() for tensor in (per_square, scale, inverse))
    matrix = moment.data_ptr(), moment.stride(0)
    built.move_columns(
        *(torch.get_num_threads(), *codes.shape, slope.data_ptr(), *matrix, *scales),
        *(top, codes.data_ptr(), moved.data_ptr()),
    )
    return moved


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with a warning, where it cannot be compiled or gives other codes than torch."""
    try:
        with torch.autocast("cpu", enabled=False), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            return _checked(compiled(_SOURCE, *_FLAGS))
    except OSError as error:
        warnings.warn(
            f"rounding by statistics takes longer, since its kernel cannot be compiled here ({error}): "
            "install a C++ compiler with OpenMP (g++), or name one in CXX",
            stacklevel=2,
        )
        return None


def _checked(built: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions declared, after a block of columns with every case in it.

    Raises:
        OSError: Its codes are not those of torch.
    """
    number, address, real, threads = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
    sizes: list[Any] = [threads, number, number]
    built.round_columns.argtypes = [*sizes, *[address] * 3, number, *[address] * 4, real, *[address] * 2]
    built.move_columns.argtypes = [*sizes, *[address] * 2, number, *[address] * 3, real, *[address] * 2]
    built.fit_columns.argtypes = [*sizes, *[address] * 4, real, real, *[address] * 5]
    built.fit_columns.restype = built.round_columns.restype = built.move_columns.restype = None
    random = torch.Generator().manual_seed(0)
    columns, rows = 24, 150  # no multiple of a vector's rows
    weight, left, moment = (
        torch.randn(columns, size, generator=random, dtype=torch.float32) for size in (rows, rows, columns)
    )
    scale = torch.rand(2, rows, generator=random, dtype=torch.float32).mul_(0.5)
    scale[:, ::7] = 0
    weight[0, ::2] = left[0, ::2] = 0.25  # half way between two codes
    scale[0, ::2], low = 0.5, torch.zeros(2, rows, dtype=torch.float32)
    for bits in (1, 2, 8):
        grid, groups = Grid.of(scale, low - 2.0 ** (bits - 2) * scale, bits), torch.arange(columns) % 2
        expected = _round(weight, left.clone(), moment, groups, grid)
        if not all(map(torch.equal, _round_compiled(built, weight, left, moment, groups, grid), expected)):
            raise OSError(f"compiled, it rounds otherwise than torch at {bits} bits: please report this")
        fits = []
        for fit in (partial(_fit_compiled, built), _fit):
            own, errors = grid.clone(), expected[1].clone()
            change = fit(weight, expected[0], errors, left, expected[0] + 1, moment.abs().sum() * rows, own, 1, _RIDGE)
            fits.append((change, errors, *own[:3]))
        if not all(torch.equal(*pair) for pair in zip(*fits, strict=True)):
            raise OSError(f"compiled, it fits scales otherwise than torch at {bits} bits: please report this")
        codes, per_square = expected[0], torch.rand(columns, generator=random, dtype=torch.float32)
        case = moment, per_square, scale[1], grid.inverse[1], grid.top
        moved, of_torch = codes.clone(), codes.clone()
        same = torch.equal(_move_compiled(built, moved, left, *case), _move(of_torch, left.clone(), *case))
        if not same or not torch.equal(moved, of_torch):
            raise OSError(f"compiled, it moves codes otherwise than torch at {bits} bits: please report this")
    return built
