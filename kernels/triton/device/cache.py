"""Rows of the KV cache that hold codes or e4m3: written from a row of floats, and read as float16 operands.
kernels/kv.py defines them; a row written here has the same bytes.

A cache comes as two pointers to the same memory: to its elements (int8 codes, or uint8 with two codes each), and to
float16, `grid`, for the scales and offsets behind the codes. WIDTH, the elements of a row, is constant, so that the
compiler knows how rows are aligned and reads several codes at once. BITS is 8 or 4, or 16 for a cache of floats, which
has no grid. e4m3 has none either: its elements are uint8, BITS 8. Shifts and masks convert it on every architecture,
because sm_80 has no instruction for it. Columns of a 4-bit row are worked on as two halves, the even and the odd ones,
as they lie in a byte: the order in which a product sums its columns is free.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Added and taken off again it rounds a float32 below 2^22 to the nearest integer, halves to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def codes_of(x, scale, offset, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x [G, SPAN] in steps of scale [G] from offset [G], rounded and cut off; LOW where that is not a number."""
    by = tl.where(scale > 0.0, scale, 1.0)[:, None]
    y = tl.div_rn(x - offset[:, None], tl.broadcast_to(by, x.shape))
    y = tl.where(y == y, y, LOW)
    return tl.minimum(tl.maximum(y, LOW), HIGH) + ROUND - ROUND


@triton.jit
def to_e4m3(x):
    """x float32 to the bytes of e4m3, uint8: to the nearest, halves to even, at most 448, 0x7f where not finite."""
    raw = x.to(tl.uint32, bitcast=True)
    size = raw & 0x7FFFFFFF
    kept = tl.minimum(size, 0x43E00000)
    normal = (kept - 0x3C000000 + 0x7FFFF + ((kept >> 20) & 1)) >> 20
    # Below the smallest normal one: the sum with 2^14, whose last bit is 2^-9, rounds to a multiple of it.
    small = (kept.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = ((raw >> 24) & 0x80) | tl.where(kept < 0x3C800000, small, normal)
    return tl.where(size < 0x7F800000, code, 0x7F).to(tl.uint8)


@triton.jit
def of_e4m3(code):
    """Bytes of e4m3 as float16, exactly: exponent and mantissa at their place in a float16 are 2^8 too small."""
    wide = code.to(tl.int16)
    size = (wide & 0x7F) << 7
    # 0x7f is NaN. The sign moves as the low byte's highest bit, so that nothing overflows.
    half = ((wide & 0x80) << 8) | tl.where(size == 0x3F80, 0x7E00, size).to(tl.int16)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def store_row(cache, grid, at, x, there, D, WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [BLOCK_D] float32, its first D elements, as row number `at`; nothing unless `there`."""
    d = tl.arange(0, BLOCK_D)
    if BITS == 16:
        tl.store(cache + at * WIDTH + d, x.to(cache.dtype.element_ty), mask=(d < D) & there)
    elif grid is None:
        tl.store(cache + at * WIDTH + d, to_e4m3(x), mask=(d < D) & there)
    else:
        SPAN: tl.constexpr = 32 if BLOCK_D >= 32 else BLOCK_D
        GROUPS: tl.constexpr = BLOCK_D // SPAN
        g = tl.arange(0, GROUPS)
        column = g[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        groups = tl.reshape(x, (GROUPS, SPAN))
        inside = column < D
        kept = (g * SPAN < D) & there
        # Not finite times zero is NaN, where the maximum would let some of it pass.
        poison = tl.sum(tl.where(inside, groups * 0.0, 0.0), 1)
        if BITS == 8:
            most = tl.max(tl.where(inside, tl.abs(groups), 0.0), 1)
            scale = (tl.div_rn(most, tl.full((GROUPS,), 127.0, tl.float32)) + poison).to(tl.float16)
            codes = codes_of(groups, scale.to(tl.float32), tl.zeros((GROUPS,), tl.float32), -127.0, 127.0)
            tl.store(cache + at * WIDTH + column, codes.to(tl.int8), mask=inside & there)
            tl.store(grid + at * (WIDTH // 2) + D // 2 + g, scale, mask=kept)
        else:
            least = tl.min(tl.where(inside, groups, float("inf")), 1) + 0.0
            most = tl.max(tl.where(inside, groups, float("-inf")), 1)
            step = tl.div_rn(most - least, tl.full((GROUPS,), 15.0, tl.float32)) + poison
            scale, offset = step.to(tl.float16), least.to(tl.float16)
            codes = codes_of(groups, scale.to(tl.float32), offset.to(tl.float32), 0.0, 15.0).to(tl.uint8)
            low, high = tl.split(tl.reshape(codes, (BLOCK_D // 2, 2)))
            pair = tl.arange(0, BLOCK_D // 2)
            tl.store(cache + at * WIDTH + pair, low | (high << 4), mask=(pair < D // 2) & there)
            own = grid + at * (WIDTH // 2) + D // 4 + 2 * g
            tl.store(own, scale, mask=kept)
            tl.store(own + 1, offset, mask=kept)


@triton.jit
def spread(x, COUNT: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr):
    """What belongs to groups, [ROWS, COUNT], once for each of the SPAN columns of a group; all of it turned or not."""
    if TURNED:
        return tl.reshape(tl.broadcast_to(x[:, None, :], (COUNT, SPAN, ROWS)), (COUNT * SPAN, ROWS))
    else:
        return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, COUNT, SPAN)), (ROWS, COUNT * SPAN))


@triton.jit
def load_rows(
    cache,
    grid,
    at,
    held,
    D,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Rows at [BLOCK_N], those `held`: [BLOCK_N, BLOCK_D], or under 4 bits their even and their odd columns. TURNED
    gives them as columns: [BLOCK_D, BLOCK_N]."""
    COLUMNS: tl.constexpr = BLOCK_D // 2 if BITS == 4 else BLOCK_D
    ACROSS: tl.constexpr = 1 if TURNED else 0
    row = tl.expand_dims(at, 1 - ACROSS)
    there = tl.expand_dims(held, 1 - ACROSS)
    c = tl.arange(0, COLUMNS)
    kept = there & tl.expand_dims(c < (D // 2 if BITS == 4 else D), ACROSS)
    codes = tl.load(cache + row * WIDTH + tl.expand_dims(c, ACROSS), mask=kept, other=0)
    if BITS == 16:
        return codes, codes
    elif grid is None:
        x = of_e4m3(codes)
        return x, x
    else:
        # Codes of a group that lie beside each other here.
        GROUP: tl.constexpr = 32 if BITS == 8 else 16
        SPAN: tl.constexpr = GROUP if COLUMNS >= GROUP else COLUMNS
        COUNT: tl.constexpr = COLUMNS // SPAN
        g = tl.arange(0, COUNT)
        kept = there & tl.expand_dims(g * 32 < D, ACROSS)
        if BITS == 8:
            own = grid + row * (WIDTH // 2) + D // 2 + tl.expand_dims(g, ACROSS)
            scale = tl.load(own, mask=kept, other=0.0).to(tl.float32)
            x = (codes.to(tl.float32) * spread(scale, COUNT, SPAN, BLOCK_N, TURNED)).to(tl.float16)
            return x, x
        else:
            own = grid + row * (WIDTH // 2) + D // 4 + 2 * tl.expand_dims(g, ACROSS)
            scale = tl.load(own, mask=kept, other=0.0).to(tl.float32)
            offset = tl.load(own + 1, mask=kept, other=0.0).to(tl.float32)
            scales = spread(scale, COUNT, SPAN, BLOCK_N, TURNED)
            offsets = spread(offset, COUNT, SPAN, BLOCK_N, TURNED)
            even = ((codes & 15).to(tl.float32) * scales + offsets).to(tl.float16)
            odd = ((codes >> 4).to(tl.float32) * scales + offsets).to(tl.float16)
            return even, odd
