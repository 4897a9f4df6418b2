"""The device side of `grouped.py`."""

import triton
from triton import language as tl


@triton.jit
def multiply_rows(
    x,
    y,
    starts,
    experts,
    codes,
    scales,
    offsets,
    ends,
    out,
    inp,
    groups,
    blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """See `grouped.multiply`. A program computes COLUMNS columns of the output for all rows of one expert.

    Eight codes are BITS bytes. EIGHTS eights of a matrix row are multiplied at a time, one position of all at once.
    """
    matrix = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts + matrix)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    codes += matrix * out * (inp // 8 * BITS)
    scales += matrix * out * groups
    offsets += matrix * out * groups
    ends += matrix * blocks * 4
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, inp // 8, EIGHTS):
            eight = begin + tl.arange(0, EIGHTS)
            inside = (eight[:, None] < inp // 8) & (column < out)
            group = column * groups + eight[:, None] * 8 // GROUP
            scale = _expand(scales, ends, group, inside, BLOCK)
            offset = _expand(offsets, ends + 2, group, inside, BLOCK)
            for place in tl.static_range(8):
                byte = codes + column * (inp // 8 * BITS) + eight[:, None] * BITS + place * BITS // 8
                code = tl.load(byte, inside, 0).to(tl.int32)
                if place * BITS % 8 + BITS > 8:
                    code |= tl.load(byte + 1, inside, 0).to(tl.int32) << 8
                code = (code >> (place * BITS % 8)) & ((1 << BITS) - 1)
                weight = (code.to(tl.float32) * scale + offset).to(x.dtype.element_ty)
                here = (row < last) & (eight[None, :] < inp // 8)
                activation = tl.load(x + row * inp + eight[None, :] * 8 + place, here, 0)
                total = tl.dot(activation, weight, total, input_precision="ieee")
        tl.store(y + row * out + column, total.to(y.dtype.element_ty), (row < last) & (column < out))


@triton.jit
def _expand(steps, ends, index, inside, BLOCK: tl.constexpr):
    """`scales.expand`: steps between the ends of a block's range, as float32 of float16 values."""
    step = tl.load(steps + index, inside, 0).to(tl.float32)
    low = tl.load(ends + index // BLOCK * 4, inside, 0).to(tl.float32)
    high = tl.load(ends + index // BLOCK * 4 + 1, inside, 0).to(tl.float32)
    value = low + (high - low) * tl.math.div_rn(step, 255.0)
    return tl.where(step == 0, low, tl.where(step == 255, high, value)).to(tl.float16).to(tl.float32)
