"""The small ops of a step: one program a token (or a row), everything between a load and a store in registers.

All sums are float32, in an order that depends on the row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.kernels.triton.device.cache import store_row
from dibit.kernels.triton.device.qlinear import finished


@triton.jit
def norm_kernel(x, residual, weight, y, total, eps, K, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """y = rms_norm(x (+ residual)) * weight of one row [K], K <= BLOCK; with ADD the sum goes to `total`."""
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    inside = k < K
    h = tl.load(x + row + k, mask=inside, other=0.0)
    if ADD:
        # The sum is rounded to its type before it is normalized, as the reference does.
        wide = h.to(tl.float32) + tl.load(residual + row + k, mask=inside, other=0.0).to(tl.float32)
        h = wide.to(total.dtype.element_ty)
        tl.store(total + row + k, h, mask=inside)
    v = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 0) / K + eps)
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + k, (v * scale * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, y, COLUMNS, BLOCK: tl.constexpr):
    """y [T, I] = silu(gate) * up of gate_up [T, 2 I]; programs (blocks of I, T)."""
    t = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < COLUMNS
    gate = tl.load(gate_up + t * 2 * COLUMNS + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * 2 * COLUMNS + COLUMNS + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * COLUMNS + i, (gate / (1.0 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def turned(
    qkv,
    sums,
    factors,
    scales,
    zeros,
    bias,
    cos,
    sin,
    m,
    position,
    first,
    d,
    inside,
    T,
    WIDTH,
    HALF,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Elements d of heads of token m, rotated by the angles of `position`, float32; a head's columns begin at `first`.
    first, d and `inside` may be of any shapes that go together. qkv [T, WIDTH] as `finished` takes it."""
    x = finished(
        qkv, sums, factors, scales, zeros, bias, m, first + d, inside, T, WIDTH,
        SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
    )  # fmt: skip
    # The other element of the pair, and its angle: j with j + HALF, for the first 2 * HALF columns.
    low = d < HALF
    rotated = d < 2 * HALF
    partner = finished(
        qkv, sums, factors, scales, zeros, bias, m, first + tl.where(low, d + HALF, d - HALF), inside & rotated,
        T, WIDTH, SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
    )  # fmt: skip
    angle = position * HALF + tl.where(low, d, d - HALF)
    c = tl.load(cos + angle, mask=rotated, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=rotated, other=0.0).to(tl.float32)
    # Which of the products an addition takes in unrounded is not left to the compiler: several kernels rotate.
    return tl.fma(x, c, tl.where(low, -partner, partner) * s)


@triton.jit
def store_token(
    cache, grid, x, slot, kv_head, KV_HEADS, BLOCK_SIZE, D,
    WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_D], the key or value of one head and token, to the cache at `slot`; nothing where that is negative. Its
    type is that of the activations, to which the reference's rotation rounds first."""
    at = ((slot // BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    store_row(cache, grid, at, x.to(tl.float32), slot >= 0, D, WIDTH, BITS, BLOCK_D)


@triton.jit
def rope_kv_write_kernel(
    qkv,
    sums,
    factors,
    scales,
    zeros,
    bias,
    positions,
    cos,
    sin,
    k_cache,
    k_grid,
    v_cache,
    v_grid,
    slots,
    q,
    T,
    HEADS,
    KV_HEADS,
    BLOCK_SIZE,
    HALF,
    D,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one token; programs (H + 2 KH, T). Rotates q to `q` and k to the cache, copies v to the cache; caches
    as device/cache.py takes them.

    qkv [T, (H + 2 KH) D], or with PARTIAL the runs of that product (`finished` in device/qlinear.py).
    """
    head = tl.program_id(0)
    m = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    width = (HEADS + 2 * KV_HEADS) * D
    kv_head = head - HEADS
    if head < HEADS + KV_HEADS:
        value = turned(
            qkv, sums, factors, scales, zeros, bias, cos, sin, m, tl.load(positions + m), head * D, d, inside,
            T, width, HALF, SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
        )  # fmt: skip
        if head < HEADS:
            tl.store(q + (m.to(tl.int64) * HEADS + head) * D + d, value.to(q.dtype.element_ty), mask=inside)
        else:
            store_token(
                k_cache, k_grid, value.to(qkv.dtype.element_ty), tl.load(slots + m), kv_head, KV_HEADS, BLOCK_SIZE, D,
                K_WIDTH, K_BITS, BLOCK_D,
            )  # fmt: skip
    else:
        value = finished(
            qkv, sums, factors, scales, zeros, bias, m, head * D + d, inside, T, width,
            SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
        )  # fmt: skip
        store_token(
            v_cache, v_grid, value.to(qkv.dtype.element_ty), tl.load(slots + m), kv_head - KV_HEADS, KV_HEADS,
            BLOCK_SIZE, D, V_WIDTH, V_BITS, BLOCK_D,
        )  # fmt: skip


@triton.jit
def embedding_kernel(
    ids,
    codes,
    scales,
    zeros,
    y,
    N,
    NP,
    K,
    UNITS,
    GROUP,
    BITS: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows `ids` of a packed table as y [T, K] float32; programs (blocks of K, T). An id outside it gives NaN."""
    SETS: tl.constexpr = 3 if BITS == 3 else 1
    UNIT: tl.constexpr = 256 if BITS == 3 else 256 // BITS
    t = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    wanted = tl.load(ids + t)
    known = (wanted >= 0) & (wanted < N)
    row = tl.where(known, wanted, 0)
    unit = k // UNIT
    plane = k % UNIT // 16
    words = codes + (((row // 64) * UNITS + unit) * SETS * 64 + row % 64) * 16 + k % 16
    if BITS == 3:
        last = plane == 15
        word_set = tl.where(last, 0, plane // 5)
        w = tl.load(words + word_set * 1024, mask=inside, other=0).to(tl.int32)
        b = tl.load(words + 1024, mask=inside & last, other=0).to(tl.int32)
        c = tl.load(words + 2048, mask=inside & last, other=0).to(tl.int32)
        tops = ((w >> 15) & 1) | ((b >> 14) & 2) | ((c >> 13) & 4)
        code = tl.where(last, tops, (w >> (plane % 5 * 3)) & 7)
    else:
        w = tl.load(words, mask=inside, other=0).to(tl.int32)
        code = (w >> (plane * BITS)) & ((1 << BITS) - 1)
    group = k // GROUP
    scale = tl.load(scales + group * NP + row, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zeros + group * NP + row, mask=inside, other=0).to(tl.float32) * ZERO_STEP + ZERO_BASE
    value = (code.to(tl.float32) - zero) * scale
    tl.store(y + t * K + k, tl.where(known, value, float("nan")), mask=inside)


@triton.jit
def block_argmax_kernel(scores, peaks, places, V, BLOCKS, BLOCK: tl.constexpr):
    """The highest of one block of one row, and the first place it stands at; programs (blocks of V, R)."""
    b = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    v = b * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(scores + r * V + v, mask=v < V, other=float("-inf"))
    # NaN counts as the highest of all: it is ranked apart, since a comparison with it is false.
    is_nan = (s != s) & (v < V)
    any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    best = tl.max(tl.where(is_nan, float("-inf"), s), 0)
    hit = tl.where(any_nan, is_nan, (s == best) & (v < V))
    tl.store(places + r * BLOCKS + b, tl.min(tl.where(hit, v, 2147483647), 0))
    tl.store(peaks + r * BLOCKS + b, tl.where(any_nan, float("nan"), best))


@triton.jit
def row_argmax_kernel(block_peaks, block_places, ids, peaks, BLOCKS, BLOCK: tl.constexpr):
    """The highest over a row's blocks, BLOCKS <= BLOCK; one program a row."""
    r = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK)
    s = tl.load(block_peaks + r * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
    places = tl.load(block_places + r * BLOCKS + b, mask=b < BLOCKS, other=2147483647)
    is_nan = s != s
    any_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    best = tl.max(tl.where(is_nan, float("-inf"), s), 0)
    hit = tl.where(any_nan, is_nan, s == best)
    tl.store(ids + r, tl.min(tl.where(hit, places, 2147483647), 0).to(tl.int64))
    tl.store(peaks + r, tl.where(any_nan, float("nan"), best))
