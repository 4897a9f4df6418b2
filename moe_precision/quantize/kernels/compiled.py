"""Unpack and multiply in one pass, for any width: plain tensor code that ``torch.compile`` turns into a CPU kernel.

Codes lie in 32-bit words, as many as fit, and sixteen rows stand side by side, one a lane: each vector that is loaded
serves sixteen rows, and no sum across lanes is needed. A code is not shifted down: it is masked where it is, converted,
and the activations are divided by its place value beforehand, so that a code costs a mask, a conversion and one
multiply-add. More than a few tokens are multiplied by blocks of rows that are dequantized while they fit in the cache.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import pack, unpack
from .base import Kernel, Matrices, Request

_LANES = 16
_WORD = 32
_ONE_BY_ONE = 4  # tokens up to which the matrix is unpacked anew for each
_BLOCK_BYTES = 1 << 22  # of dequantized rows at a time
_WORTH_COMPILING = 1 << 20  # weights of a matrix: below, a second of compiling is never earned back


class Compiled(Kernel):
    """Words, scales and offsets, all with the rows of a block in the last dimension."""

    name = "torch.compile"

    words: Tensor  # (count, out / 16, in / group, words of a group, 16) int32
    scales: Tensor  # (count, out / 16, in / group, 16) float16
    offsets: Tensor

    @staticmethod
    def fits(request: Request) -> bool:
        return (
            request.device == "cpu"
            and request.out % _LANES == 0
            and request.out * request.inp >= _WORTH_COMPILING
            and compiler_works()
        )

    def __init__(self, matrices: Matrices, bits: int, group_size: int) -> None:
        super().__init__(matrices, bits, group_size)
        shape = self.count, self.out // _LANES, self.inp // group_size, -(-group_size // self._in_word), _LANES
        words = torch.empty(shape, dtype=torch.int32)
        for index, codes in enumerate(matrices.codes):
            words[index] = self._words(codes)
        scales, offsets = (_lanes(tensor, 1) for tensor in matrices.floats())
        self.keep(words=words, scales=scales, offsets=offsets)

    @property
    def _in_word(self) -> int:
        """Codes in a word."""
        return _WORD // self.bits

    def _words(self, packed: Tensor) -> Tensor:
        groups = unpack(packed, self.bits).view(self.out, -1, self.group_size)
        missing = -self.group_size % self._in_word
        codes = F.pad(groups, (0, missing)).unflatten(-1, (-1, self._in_word))  # (out, in / group, words, codes)
        words = torch.zeros(codes.shape[:-1], dtype=torch.int32)
        for place in range(self._in_word):
            words |= codes[..., place].int() << (self.bits * place)
        return _lanes(words, 0)

    def multiply(self, index: int, x: Tensor) -> Tensor:
        words, scale, offset = self.words[index], self.scales[index], self.offsets[index]
        if len(x) <= _ONE_BY_ONE:
            vector = _vector(self.bits, words.shape)
            activations = _prepare(x.float(), self.bits, self.group_size)
            sums = activations.sum((2, 3))
            activations = activations * _place_values(self.bits)
            rows = [vector(words, scale, offset, activations[i], sums[i]) for i in range(len(x))]
            return torch.stack(rows).to(x.dtype)
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        columns = _prepare(x.to(dtype), self.bits, self.group_size).movedim(-1, 1).flatten(1)
        blocks = max(1, _BLOCK_BYTES // (_LANES * columns.shape[1] * dtype.itemsize))
        parts = [slice(start, start + blocks) for start in range(0, len(words), blocks)]
        products = [
            columns @ _block(self.bits, words[p].shape, dtype)(words[p], scale[p].float(), offset[p].float())
            for p in parts
        ]
        return torch.cat(products, dim=1).to(x.dtype)

    def matrix(self, index: int) -> Matrices:
        scale, offset = (t[index].movedim(-1, 1).flatten(0, 1).unsqueeze(0) for t in (self.scales, self.offsets))
        return Matrices.of(pack(self.codes(index), self.bits).unsqueeze(0), scale, offset)

    def codes(self, index: int) -> Tensor:
        words = self.words[index].movedim(-1, 1).flatten(0, 1)  # (out, in / group, words)
        mask = 2**self.bits - 1
        codes = torch.stack([(words >> (self.bits * place)) & mask for place in range(self._in_word)], dim=-1)
        return codes.flatten(-2)[..., : self.group_size].to(torch.uint8).reshape(self.out, self.inp)


def _lanes(rows: Tensor, dim: int) -> Tensor:
    """``(..., out, groups, ...)`` -> ``(..., out / 16, groups, ..., 16)``; ``dim`` is that of ``out``."""
    return rows.unflatten(dim, (-1, _LANES)).movedim(dim + 1, -1).contiguous()


def _prepare(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Activations by the place of their code: ``(tokens, in)`` -> ``(tokens, in / group, words, codes)``."""
    in_word = _WORD // bits
    groups = F.pad(x.unflatten(-1, (-1, group_size)), (0, -group_size % in_word))
    return groups.unflatten(-1, (-1, in_word))


@cache
def _place_values(bits: int) -> Tensor:
    """By what activations are multiplied, for codes that are masked in their place and not shifted down."""
    return torch.tensor([2.0 ** -(bits * place) if _masked(bits, place) else 1.0 for place in range(_WORD // bits)])


def _masked(bits: int, place: int) -> bool:
    return bits * (place + 1) < _WORD  # else the mask would reach the sign


def _codes_in_place(words: Tensor, bits: int, place: int) -> Tensor:
    mask = 2**bits - 1
    return (words & (mask << (bits * place)) if _masked(bits, place) else (words >> (bits * place)) & mask).float()


@cache
def _vector(bits: int, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """``W @ x`` for one token: words, scales, offsets, activations ``(in / group, words, codes)``, and their sums."""

    def vector(words: Tensor, scale: Tensor, offset: Tensor, activations: Tensor, sums: Tensor) -> Tensor:
        products = torch.zeros((), dtype=torch.float32)
        for place in range(_WORD // bits):
            products = products + _codes_in_place(words, bits, place) * activations[:, :, place, None]
        by_group = products.sum(2) * scale.float() + offset.float() * sums[:, None]  # (out / 16, in / group, 16)
        return by_group.sum(1).flatten()

    return _compile(vector)


@cache
def _block(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The transpose of some rows, dequantized: ``(columns, rows)``, columns by place in the word, group and word."""

    def block(words: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        words = words.permute(1, 2, 0, 3)  # (in / group, words, out / 16, 16)
        scale, offset = (t.transpose(0, 1).unsqueeze(1) for t in (scale, offset))  # (in / group, 1, out / 16, 16)
        mask = 2**bits - 1
        places = range(_WORD // bits)
        codes = [((words >> (bits * place)) & mask).float() for place in places]
        return torch.stack([(code * scale + offset).to(dtype) for code in codes]).contiguous()

    compiled = _compile(block)
    return lambda *args: compiled(*args).view(-1, _LANES * shape[0])


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for one shape. torch counts shapes by code object and gives up after a few, hence a copy of it."""
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__, name=function.__name__
    )
    compiled = torch.compile(copy, fullgraph=True, dynamic=False)

    def call(*args: Tensor) -> Tensor:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return compiled(*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # as many modes and numbers of threads: slow, and right
            return function(*args)

    return call


@cache
def compiler_works() -> bool:
    """Whether ``torch.compile`` can make CPU kernels here: it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(2))
    except Exception as error:  # whatever the compiler or its absence raises
        warnings.warn(
            f"no kernels from torch.compile ({type(error).__name__}): packed matrices are multiplied by slower ways; "
            "install a C++ compiler (g++)",
            stacklevel=2,
        )
        return False
    return True
