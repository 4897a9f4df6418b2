"""Unpack and multiply in one pass, for any width: C++ that is compiled for this CPU at its first use (`native.cpp`).

Codes become floats in registers, for up to sixteen tokens at a time, so that one token costs little more than reading
the codes, and many cost no more than a float matrix would. A token's product does not depend on how many others are
multiplied with it, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec.packing import pack, unpack
from .base import Kernel, Matrices, Request, scaled
from .compiler import compiled

_SOURCE = Path(__file__).with_name("native.cpp")


class Words(NamedTuple):
    """Matrices of one width as the kernel reads them, all contiguous.

    Attributes:
        bits: Width of a code.
        words: ``(count, out / lanes, in / group, words of a group, lanes)`` int32.
        scales: ``(count, out / lanes, in / group, lanes)`` float16.
        offsets: The same.
    """

    bits: int
    words: Tensor
    scales: Tensor
    offsets: Tensor


class _Matrices(ctypes.Structure):
    """`Matrices` in native.cpp."""

    _fields_ = tuple(
        [(name, ctypes.c_int64) for name in ("bits", "count")]
        + [(name, ctypes.c_void_p) for name in ("experts", "words", "scale", "offset")]
        + [(name, ctypes.c_int64) for name in ("out", "groups", "pairs")]
    )


class Native(Kernel):
    """Words, scales and offsets, all with the rows of a block in the last dimension."""

    name = "C++"
    in_int8 = False  # whether activations are rounded to int8

    words: Tensor  # (count, out / lanes, in / group, words of a group, lanes) int32
    scales: Tensor  # (count, out / lanes, in / group, lanes) float16
    offsets: Tensor

    @staticmethod
    def fits(request: Request) -> bool:
        if request.device != "cpu":
            return False
        built = library()
        return built is not None and request.out % built.lanes() == 0

    def __init__(self, matrices: Matrices, bits: int, group_size: int) -> None:
        super().__init__(matrices, bits, group_size)
        lanes = _built().lanes()
        in_word, places = _unit(bits)
        in_group = -(-group_size // len(places)) * in_word
        words = torch.empty(
            self.count, self.out // lanes, self.inp // group_size, in_group, lanes, dtype=torch.int32, device="cpu"
        )
        _built().want_huge_pages(words.data_ptr(), words.numel() * words.element_size())
        for index, codes in enumerate(matrices.codes):
            words[index] = to_words(unpack(codes, bits), bits, group_size, lanes)
        scales, offsets = (torch.stack([_lanes(one, lanes) for one in tensor]) for tensor in matrices.floats())
        self.keep(words=words, scales=scales, offsets=offsets)
        self.form = Words(bits, words, scales, offsets)  # the same tensors: reading buffers takes time

    def multiply(self, index: int, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.out)
        one = Words(self.bits, *(tensor[index : index + 1] for tensor in self.form[1:]))
        starts = torch.tensor([0, len(x)], device="cpu")
        multiply(_built(), [(one, starts[:1])], self.group_size, x, starts, y, self.in_int8)
        return y

    @classmethod
    def grouped(cls, buckets: Sequence[tuple[Kernel, Tensor]], x: Tensor, starts: Tensor, y: Tensor) -> None:
        forms = [(cast(Native, kernel).form, experts) for kernel, experts in buckets]
        multiply(_built(), forms, buckets[0][0].group_size, x.contiguous(), starts, y, cls.in_int8)

    def matrix(self, index: int) -> Matrices:
        scale, offset = (_rows(tensor[index]).unsqueeze(0) for tensor in (self.scales, self.offsets))
        return Matrices.of(pack(self.codes(index), self.bits).unsqueeze(0), scale, offset)

    def float_matrix(self, index: int) -> Tensor:
        return scaled(self.codes(index), _rows(self.scales[index]), _rows(self.offsets[index]))

    def codes(self, index: int) -> Tensor:
        count, places = _unit(self.bits)
        words = _rows(self.words[index]).unflatten(-1, (-1, count))  # (out, in / group, units of a group, words)
        codes = torch.zeros(*words.shape[:-1], len(places), dtype=torch.uint8, device="cpu")
        for column, parts in enumerate(places):
            for word, mask, shift in parts:
                codes[..., column] |= ((words[..., word] >> shift) & mask).to(torch.uint8)
        found: Tensor = codes.flatten(-2)[..., : self.group_size].reshape(self.out, self.inp)
        return found


class NativeInt8(Native):
    """The same words, with activations rounded to int8: an error of 0.6 % of a product, where bfloat16 has 0.2 %.

    It takes 16-bit activations and up to four bits, whose own error is more than ten times as large.
    """

    name = "C++ in int8"
    in_int8 = True

    @staticmethod
    def fits(request: Request) -> bool:
        if request.exact or request.training or request.dtype not in (torch.bfloat16, torch.float16):
            return False
        return Native.fits(request) and request.bits <= _built().most_bits_with_int8()


def to_words(codes: Tensor, bits: int, group_size: int, lanes: int) -> Tensor:
    """Codes in the order of the kernel.

    Args:
        codes: ``(out, in)`` uint8.
        bits: Width of a code.
        group_size: Weights that share a scale and an offset; words do not cross from one group to the next.
        lanes: Rows that lie side by side.

    Returns:
        ``(out / lanes, in / group, words of a group, lanes)`` int32.
    """
    count, places = _unit(bits)
    units = F.pad(codes.unflatten(1, (-1, group_size)), (0, -group_size % len(places))).unflatten(-1, (-1, len(places)))
    words = torch.zeros(*units.shape[:-1], count, dtype=torch.int32, device="cpu")
    for column, parts in enumerate(places):
        for word, mask, shift in parts:
            words[..., word] |= (units[..., column].int() & mask) << shift
    words = words.flatten(-2)
    return _lanes(words, lanes)


def multiply(
    library: ctypes.CDLL,
    buckets: Sequence[tuple[Words, Tensor]],
    group_size: int,
    x: Tensor,
    starts: Tensor,
    y: Tensor,
    in_int8: bool = False,
) -> None:
    """See `Kernel.grouped`; all tensors are contiguous, and sums are in float32.

    Args:
        library: The compiled kernel.
        buckets: Matrices of one shape, at least one width, and the experts of each, ``(count,)`` int64.
        group_size: Weights that share a scale and an offset.
        x: ``(rows, in)`` of any float dtype.
        starts: ``(experts of the layer + 1,)`` int64.
        y: ``(rows, out)`` of the dtype of ``x``.
        in_int8: Activations are rounded first, as `rounded` does; for codes of up to four bits.
    """
    in_bfloat16 = x.dtype == torch.bfloat16 and (in_int8 or bool(library.knows_bfloat16()))
    as_it_is = x.dtype == torch.float32 or in_bfloat16
    given, result = (x, y) if as_it_is else (x.float(), y.float())
    _, blocks, groups, _, lanes = buckets[0][0].words.shape
    shape = blocks * lanes, groups, group_size // 2
    of_widths = [
        _Matrices(form.bits, len(experts), *(tensor.data_ptr() for tensor in (experts, *form[1:])), *shape)
        for form, experts in buckets
    ]
    widths = (_Matrices * len(buckets))(*of_widths)
    rows = given.data_ptr(), result.data_ptr(), starts.data_ptr()
    library.multiply_packed(widths, len(buckets), given.dtype == torch.bfloat16, in_int8, *rows)
    if result is not y:
        y.copy_(result)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with a warning, where it cannot be compiled or gives wrong products."""
    try:
        with torch.autocast("cpu", enabled=False), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            return _checked(compiled(_SOURCE))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"packed matrices are multiplied more slowly, since their kernel cannot be compiled here ({error}): "
            "install a C++ compiler with OpenMP (g++), or name one in CXX",
            stacklevel=2,
        )
        return None


def _built() -> ctypes.CDLL:
    built = library()
    assert built is not None, "kernels are made where they fit"
    return built


def _checked(built: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions declared, after a product of every width.

    Raises:
        OSError: A product is not that of the dequantized weight.
    """
    number, address = ctypes.c_int64, ctypes.c_void_p
    built.multiply_packed.argtypes = [address, number, *[ctypes.c_int] * 2, *[address] * 3]
    built.multiply_packed.restype = None
    built.want_huge_pages.argtypes = [address, number]
    built.want_huge_pages.restype = None
    lanes, group_size = built.lanes(), 24  # with words that are not full
    random = torch.Generator().manual_seed(0)
    starts, experts = torch.tensor([0, 1, 5, 24]), torch.tensor([2, 0])  # expert 1 has no matrix here
    before = None
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (2 * lanes, 2 * group_size), generator=random, dtype=torch.uint8)
        scale, offset = torch.randn(2, 2 * lanes, 2, generator=random, dtype=torch.float32).half()
        parts = to_words(codes, bits, group_size, lanes), *(_lanes(one, lanes) for one in (scale, offset))
        now = Words(bits, *(part.unsqueeze(0) for part in parts)), scaled(codes, scale, offset)
        (form, weight), (other_form, other) = now, before or now  # two widths in one call
        buckets = [(form, experts[:1]), (other_form, experts[1:])]
        before = now
        x = torch.randn(24, 2 * group_size, generator=random, dtype=torch.float32)
        ways = [(torch.float32, 1e-5, False), (torch.bfloat16, 1e-2, False)]
        if bits <= built.most_bits_with_int8():
            ways += [(torch.float32, 1e-5, True), (torch.bfloat16, 1e-2, True)]
        for dtype, tolerance, in_int8 in ways:
            got = torch.zeros(24, 2 * lanes, dtype=dtype)
            given = x.to(dtype)
            multiply(built, buckets, group_size, given, starts, got, in_int8)
            exact = torch.zeros(24, 2 * lanes, dtype=torch.float32)
            seen = rounded(given, group_size) if in_int8 else given.float()
            exact[5:], exact[:1] = seen[5:] @ weight.T, seen[:1] @ other.T
            if not (got - exact).norm() <= tolerance * exact.norm():
                by = " and activations in int8" if in_int8 else ""
                raise OSError(f"compiled, it gives wrong products at {bits} bits with {dtype}{by}: please report this")
    return built


def rounded(x: Tensor, group_size: int) -> Tensor:
    """Activations as a product in int8 sees them: whole steps of a 127th of the largest magnitude of each group.

    Args:
        x: ``(rows, in)``, any float dtype.
        group_size: Columns that share a step.

    Returns:
        ``(rows, in)`` float32.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    size = groups.abs().amax(-1, keepdim=True) / 127
    steps = (groups / torch.where(size > 0, size, 1.0)).round()
    found: Tensor = (steps * size).flatten(-2)
    return found


def _unit(bits: int) -> tuple[int, list[list[tuple[int, int, int]]]]:
    """How words hold codes, as `Unit` in native.cpp has it.

    Returns:
        How many words belong together, and where each column's code is: ``(word, mask, shift)`` of each of its parts.
    """
    mask = 2**bits - 1
    if bits != 3:  # pairs, one in each half of a word
        return 1, [[(0, mask, bits * pair + half)] for pair in range(16 // bits) for half in (0, 16)]
    places = []
    for pair in range(16):
        for half in (0, 16):
            q, byte = pair % 8, pair // 8 * 8 + half
            if q < 6:
                places.append([(q // 2, mask, q % 2 * 3 + byte)])
            else:  # in the upper two bits of bytes
                places.append([(q - 6, 3, 6 + byte), (2, 4, q - 2 + byte)])
    return 3, places


def _lanes(rows: Tensor, lanes: int) -> Tensor:
    """``(out, ...)`` -> ``(out / lanes, ..., lanes)``."""
    found: Tensor = rows.unflatten(0, (-1, lanes)).movedim(1, -1).contiguous()
    return found


def _rows(lanes: Tensor) -> Tensor:
    """Inverse of `_lanes`."""
    return lanes.movedim(-1, 1).flatten(0, 1)
