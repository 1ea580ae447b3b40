"""Paged attention with the softmax computed as keys go by (Milakov & Gimelshein 2018; Dao 2022), keys in splits
(Flash-Decoding, Dao et al. 2023).

A program serves BLOCK_Q tokens of one sequence and all query heads of one KV head, so each key is read once for the
group: BLOCK_Q * BLOCK_G rows of a matrix instruction. Keys are cut into splits of SPLIT_KEYS, whatever the batch, and
splits are joined in ascending order: by `merge_kernel` when they were computed side by side (decoding), in the program
itself when there are queries enough without that (prefill). A row's bits depend on its own position and keys only: a
masked key adds an exact zero, a split without a visible key changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.kernels.triton.device.cache import load_rows

JOINED_AT_ONCE = tl.constexpr(4)


@triton.jit
def attend_split(
    queries,
    odd_queries,
    k_cache,
    k_grid,
    v_cache,
    v_grid,
    table,
    first,
    stop,
    position,
    kv_head,
    scale,
    KV_HEADS,
    BLOCK_SIZE,
    D,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of queries [ROWS, BLOCK_D] over keys first .. stop - 1: the result, and log2 of the sum of weights.

    Where keys have 4 bits `queries` and `odd_queries` are the even and the odd columns, [ROWS, BLOCK_D / 2]; where
    values have, the result is so divided. Without, the second part means nothing.
    """
    HALF: tl.constexpr = BLOCK_D // 2 if V_BITS == 4 else BLOCK_D
    ODD: tl.constexpr = HALF if V_BITS == 4 else 1
    n = tl.arange(0, BLOCK_N)
    highest = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HALF), tl.float32)
    odd_acc = tl.zeros((ROWS, ODD), tl.float32)
    for begin in range(first, stop, BLOCK_N):
        key = begin + n
        held = key < stop
        page = tl.load(table + key // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        at = (page * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        keys, odd_keys = load_rows(k_cache, k_grid, at, held, D, K_WIDTH, K_BITS, BLOCK_D, BLOCK_N, TURNED=True)
        scores = tl.dot(queries, keys, input_precision="ieee")
        if K_BITS == 4:
            scores = tl.dot(odd_queries, odd_keys, scores, input_precision="ieee")
        scores *= scale
        seen = held[None, :] & (key[None, :] <= position[:, None])
        scores = tl.where(seen, scores, -1.0e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        values, odd_values = load_rows(v_cache, v_grid, at, held, D, V_WIDTH, V_BITS, BLOCK_D, BLOCK_N, TURNED=False)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        if V_BITS == 4:
            odd_acc = tl.dot(p.to(values.dtype), odd_values, odd_acc * shrink[:, None], input_precision="ieee")
        highest = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    return acc / safe[:, None], odd_acc / safe[:, None], tl.where(some, highest + tl.log2(safe), float("-inf"))


@triton.jit
def attention_kernel(
    q,
    k_cache,
    k_grid,
    v_cache,
    v_grid,
    cu_seqlens,
    seq_lens,
    block_tables,
    out,
    weights,
    scale,
    HEADS,
    KV_HEADS,
    GROUP,
    TABLE_STRIDE,
    BLOCK_SIZE,
    SPLITS,
    SPLIT_KEYS,
    D,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q [T, HEADS, D] -> out [T, HEADS, D]; programs (blocks of the longest chunk, sequence, KV head).

    With PARTIAL, programs (.., .., KV head * SPLITS), out [T, HEADS, SPLITS, D] and weights [T, HEADS, SPLITS], the
    log2 of the sum of weights. `scale` includes log2(e). Caches as device/cache.py takes them.
    """
    ROWS: tl.constexpr = BLOCK_Q * BLOCK_G
    block = tl.program_id(0)
    b = tl.program_id(1)
    start = tl.load(cu_seqlens + b)
    count = tl.load(cu_seqlens + b + 1) - start
    length = tl.load(seq_lens + b)
    r = tl.arange(0, ROWS)
    token = block * BLOCK_Q + r // BLOCK_G
    member = r % BLOCK_G
    wanted = (token < count) & (member < GROUP)
    position = length - count + token
    # Keys up to the last token of this block; none when the block is past the chunk's end.
    stop = tl.where(block * BLOCK_Q < count, tl.minimum(length - count + block * BLOCK_Q + BLOCK_Q, length), 0)
    if PARTIAL:
        kv_head = tl.program_id(2) // SPLITS
    else:
        kv_head = tl.program_id(2)
    row = (start + token).to(tl.int64) * HEADS + kv_head * GROUP + member
    table = block_tables + b * TABLE_STRIDE
    # Columns of the queries, and of the result, as the operands are divided: the even ones first under 4 bits.
    K_STEP: tl.constexpr = 2 if K_BITS == 4 else 1
    V_STEP: tl.constexpr = 2 if V_BITS == 4 else 1
    d = tl.arange(0, BLOCK_D // K_STEP) * K_STEP
    e = tl.arange(0, BLOCK_D // V_STEP) * V_STEP
    asked = wanted[:, None] & (d < D)[None, :]
    inside = wanted[:, None] & (e < D)[None, :]
    # Matrix instructions take one type, the cache's or what codes become; scores are scaled in float32 afterwards.
    kind: tl.constexpr = k_cache.dtype.element_ty if K_BITS == 16 else tl.float16
    queries = tl.load(q + row[:, None] * D + d[None, :], mask=asked, other=0.0).to(kind)
    odd_queries = queries
    if K_BITS == 4:
        odd_queries = tl.load(q + row[:, None] * D + d[None, :] + 1, mask=asked, other=0.0).to(kind)
    if PARTIAL:
        split = tl.program_id(2) % SPLITS
        first = split * SPLIT_KEYS
        share, odd_share, weight = attend_split(
            queries, odd_queries, k_cache, k_grid, v_cache, v_grid, table, first, tl.minimum(first + SPLIT_KEYS, stop),
            position, kv_head, scale, KV_HEADS, BLOCK_SIZE, D, K_WIDTH, V_WIDTH, K_BITS, V_BITS, BLOCK_D, ROWS,
            BLOCK_N,
        )  # fmt: skip
        at = row * SPLITS + split
        tl.store(out + at[:, None] * D + e[None, :], share, mask=inside)
        if V_BITS == 4:
            tl.store(out + at[:, None] * D + e[None, :] + 1, odd_share, mask=inside)
        tl.store(weights + at, weight, mask=wanted)
    else:
        ODD: tl.constexpr = BLOCK_D // 2 if V_BITS == 4 else 1
        highest = tl.full((ROWS,), -1.0e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_D // V_STEP), tl.float32)
        odd_acc = tl.zeros((ROWS, ODD), tl.float32)
        for first in range(0, stop, SPLIT_KEYS):
            share, odd_share, weight = attend_split(
                queries, odd_queries, k_cache, k_grid, v_cache, v_grid, table, first,
                tl.minimum(first + SPLIT_KEYS, stop), position, kv_head, scale, KV_HEADS, BLOCK_SIZE, D, K_WIDTH,
                V_WIDTH, K_BITS, V_BITS, BLOCK_D, ROWS, BLOCK_N,
            )  # fmt: skip
            higher = tl.maximum(highest, weight)
            old = tl.exp2(highest - higher)
            new = tl.exp2(weight - higher)
            acc = acc * old[:, None] + share * new[:, None]
            if V_BITS == 4:
                odd_acc = odd_acc * old[:, None] + odd_share * new[:, None]
            total = total * old + new
            highest = higher
        safe = tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + row[:, None] * D + e[None, :], (acc / safe).to(out.dtype.element_ty), mask=inside)
        if V_BITS == 4:
            tl.store(out + row[:, None] * D + e[None, :] + 1, (odd_acc / safe).to(out.dtype.element_ty), mask=inside)


@triton.jit
def joined(shares, weights, first, there, d, inside, splits, D):
    """Columns d of rows whose splits lie at first, first + 1, ... of shares [.., D] and weights [..], joined as
    attention_kernel joins splits itself. `first` and `there`, the rows that are, go together with d and `inside`."""
    highest = tl.where(there, -1.0e30, 0.0)
    total = tl.where(there, 0.0, 1.0)
    acc = tl.zeros(inside.shape, tl.float32)
    for begin in range(0, splits, JOINED_AT_ONCE):
        # So that the loads of several are under way at once; one that is not there changes nothing.
        for split in tl.static_range(JOINED_AT_ONCE):
            at = first + begin + split
            known = begin + split < splits
            weight = tl.load(weights + at, mask=there & known, other=float("-inf"))
            share = tl.load(shares + at * D + d, mask=inside & known, other=0.0)
            higher = tl.maximum(highest, weight)
            old = tl.exp2(highest - higher)
            new = tl.exp2(weight - higher)
            acc = acc * old + share * new
            total = total * old + new
            highest = higher
    return acc / total


@triton.jit
def merge_kernel(partial, weights, out, SPLITS, D, BLOCK_D: tl.constexpr):
    """partial [rows, SPLITS, D] -> out [rows, D], as attention_kernel joins splits itself; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    result = joined(partial, weights, row * SPLITS, row >= 0, d, d < D, SPLITS, D)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=d < D)
