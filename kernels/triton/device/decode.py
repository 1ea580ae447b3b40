"""Attention for decode steps, one token a sequence, in one launch from the runs of qkv to the activations of o.

Programs (tokens, KV head * SPLITS); a program rotates its queries, attends to its split of the keys, and counts itself
in. The last one of a KV head joins the splits, the last one of a token prepares its row: whichever these are, they add
in the same order, so the order of arrival changes no bit. Splits without a key have no program.

The new key and value are written by the program whose split they lie in, before it reads them back. Where several
tokens are of one sequence, drafts for one, it writes those of the tokens before its own too: they may not be there yet,
and whoever else writes them writes the same. Which tokens those are, their slots say.

Numbers are those of rope_kv_write_kernel, attention_kernel with PARTIAL, merge_kernel and prepare_kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.kernels.triton.device.attention import attend_split, joined
from dibit.kernels.triton.device.prepare import prepare_row
from dibit.kernels.triton.device.qlinear import finished
from dibit.kernels.triton.device.small import store_token, turned


@triton.jit
def arrived(counter, wanted):
    """Whether this program is the last of `wanted` to come here. It then sees what the others stored before they came,
    and the counter is 0 again."""
    # Every thread's stores come before the one thread's count.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == wanted - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def decode_attention_kernel(
    qkv,
    qkv_sums,
    qkv_factors,
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
    seq_lens,
    block_tables,
    shares,
    weights,
    row,
    arrivals,
    half,
    sums,
    factors,
    scale,
    T,
    MP,
    KP,
    GROUPS,
    HEADS,
    KV_HEADS,
    GROUP_HEADS,
    TABLE_STRIDE,
    BLOCK_SIZE,
    TABLE_SPLITS,
    SPLIT_KEYS,
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
    JOIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
):
    """qkv [T, (HEADS + 2 KV_HEADS) D], as `finished` takes it with the constants SPLITS .. BIAS, to half [MP, KP], sums
    [GROUPS, MP] and factors [MP] as prepare_kernel stores them with BITS .. QMAX. Programs (MP, KV_HEADS *
    TABLE_SPLITS), the latter 1 without JOIN.

    In between: shares [T, HEADS, TABLE_SPLITS, D] float32 and weights [T, HEADS, TABLE_SPLITS], with JOIN only; row
    [T, HEADS, D] float32; arrivals [T, KV_HEADS + 1] int32, zeros before and after.
    """
    ROWS: tl.constexpr = BLOCK_Q * BLOCK_G
    m = tl.program_id(0)
    kv_head = tl.program_id(1) // TABLE_SPLITS
    split = tl.program_id(1) % TABLE_SPLITS
    first = split * SPLIT_KEYS
    length = tl.load(seq_lens + m, mask=m < T, other=0)
    prepares = (m >= T) & (tl.program_id(1) == 0)
    if first < length:
        stop = tl.minimum(first + SPLIT_KEYS, length)
        width = (HEADS + 2 * KV_HEADS) * D
        d = tl.arange(0, BLOCK_D)
        table = block_tables + m * TABLE_STRIDE
        token = m
        place = length - 1
        slot = tl.load(slots + m)
        own = place >= first
        while own:
            if place < stop:
                key = turned(
                    qkv, qkv_sums, qkv_factors, scales, zeros, bias, cos, sin, token, tl.load(positions + token),
                    (HEADS + kv_head) * D, d, d < D, T, width, HALF,
                    SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
                )  # fmt: skip
                value = finished(
                    qkv, qkv_sums, qkv_factors, scales, zeros, bias, token, (HEADS + KV_HEADS + kv_head) * D + d,
                    d < D, T, width, SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
                )  # fmt: skip
                store_token(
                    k_cache, k_grid, key, slot, kv_head, KV_HEADS, BLOCK_SIZE, D, K_WIDTH, K_BITS, BLOCK_D
                )  # fmt: skip
                store_token(
                    v_cache, v_grid, value, slot, kv_head, KV_HEADS, BLOCK_SIZE, D, V_WIDTH, V_BITS, BLOCK_D
                )  # fmt: skip
            token -= 1
            place -= 1
            slot = tl.load(slots + token, mask=token >= 0, other=-1)
            page = tl.load(table + place // BLOCK_SIZE, mask=place >= 0, other=0)
            own = (place >= first) & (slot == page.to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE)
        # Stored by some threads, read by others.
        tl.debug_barrier()
        g = tl.arange(0, BLOCK_G)[:, None]
        queries = turned(
            qkv, qkv_sums, qkv_factors, scales, zeros, bias, cos, sin, m, tl.load(positions + m),
            (kv_head * GROUP_HEADS + g) * D, d[None, :], (g < GROUP_HEADS) & (d < D)[None, :], T, width, HALF,
            SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
        )  # fmt: skip
        kind: tl.constexpr = k_cache.dtype.element_ty if K_BITS == 16 else tl.float16
        # As many rows as a matrix instruction takes; the results of all but the first BLOCK_G are dropped.
        queries = tl.reshape(
            tl.broadcast_to(queries.to(kind)[None, :, :], (BLOCK_Q, BLOCK_G, BLOCK_D)), (ROWS, BLOCK_D)
        )  # fmt: skip
        odd_queries = queries
        if K_BITS == 4:
            queries, odd_queries = tl.split(tl.reshape(queries, (ROWS, BLOCK_D // 2, 2)))
        r = tl.arange(0, ROWS)
        share, odd_share, weight = attend_split(
            queries, odd_queries, k_cache, k_grid, v_cache, v_grid, table, first, stop,
            tl.full((ROWS,), 0, tl.int32) + length - 1, kv_head, scale, KV_HEADS, BLOCK_SIZE, D,
            K_WIDTH, V_WIDTH, K_BITS, V_BITS, BLOCK_D, ROWS, BLOCK_N,
        )  # fmt: skip
        V_STEP: tl.constexpr = 2 if V_BITS == 4 else 1
        e = tl.arange(0, BLOCK_D // V_STEP) * V_STEP
        head = m.to(tl.int64) * HEADS + kv_head * GROUP_HEADS
        inside = (r < GROUP_HEADS)[:, None] & (e < D)[None, :]
        if JOIN:
            at = (head + r) * TABLE_SPLITS + split
            target = shares + at[:, None] * D + e[None, :]
            tl.store(weights + at, weight, mask=r < GROUP_HEADS)
        else:
            target = row + (head + r)[:, None] * D + e[None, :]
        tl.store(target, share, mask=inside)
        if V_BITS == 4:
            tl.store(target + 1, odd_share, mask=inside)
        counters = arrivals + m * (KV_HEADS + 1)
        whole = not JOIN
        if JOIN:
            held = tl.cdiv(length, SPLIT_KEYS)
            whole = arrived(counters + kv_head, held)
            if whole:
                members = (head + g) * TABLE_SPLITS
                wanted = (g < GROUP_HEADS) & (d < D)[None, :]
                result = joined(shares, weights, members, g < GROUP_HEADS, d[None, :], wanted, held, D)
                tl.store(row + (head + g) * D + d[None, :], result, mask=wanted)
        if whole:
            prepares = arrived(counters + KV_HEADS, KV_HEADS)
    if prepares:
        prepare_row(row, m, half, sums, factors, T, MP, HEADS * D, KP, GROUPS, BITS, GROUP, BLOCK, QMAX)
