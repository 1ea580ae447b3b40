"""The low-bit product on tensor cores, weights as the first operand: outᵀ = W · xᵀ.

Tokens are then the side of the matrix instruction that can be as narrow as 8, and the weights are the operand that
stays in registers: copied to shared memory in 16-byte pieces, loaded as matrix fragments, masked there, multiplied.
Scales and zero points meet the sum of a group, not its weights:

    acc += scale * 2^24 * (sum over the group of half * masked)  -  scale * zero * sums

Splits: the columns are cut into `splits` runs of whole steps, a function of the weight's shape alone. For few tokens
the runs are computed side by side and added by `reduce_kernel` in ascending order; for many, one program computes
them one after another and adds them in the same order. So a token's bits do not depend on how many tokens there are.

Integer products (`half` and `codes` are int8) multiply codes and rounded activations on integer tensor cores. Their
int32 sums are those that the float16 products make of the same integers exactly, below 2^24; everything after is the
same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.kernels.triton.device.unpack import (
    bytes_2,
    bytes_3,
    bytes_4,
    bytes_8,
    last_plane_3,
    planes_2,
    planes_3,
    planes_4,
    planes_8,
)

SUBNORMALS = tl.constexpr(16777216.0)
"""2^24: what a plane's subnormal numbers are codes by."""


@triton.jit
def step_planes(words, BITS: tl.constexpr, ASM: tl.constexpr):
    """All planes of a step; `words` points at its first word set, 1024 words before the next."""
    if BITS == 3:
        a = tl.load(words, eviction_policy="evict_first")
        b = tl.load(words + 1024, eviction_policy="evict_first")
        c = tl.load(words + 2048, eviction_policy="evict_first")
        a0, a1, a2, a3, a4 = planes_3(a, ASM)
        b0, b1, b2, b3, b4 = planes_3(b, ASM)
        c0, c1, c2, c3, c4 = planes_3(c, ASM)
        last = last_plane_3(a, b, c, ASM)
        return a0, a1, a2, a3, a4, b0, b1, b2, b3, b4, c0, c1, c2, c3, c4, last
    else:
        w = tl.load(words, eviction_policy="evict_first")
        if BITS == 2:
            return planes_2(w, ASM)
        elif BITS == 4:
            return planes_4(w, ASM)
        else:
            return planes_8(w, ASM)


@triton.jit
def scaled(
    part, sums, scales, zeros, g, n, m, NP, MP, ZERO_BASE: tl.constexpr, ZERO_STEP: tl.constexpr, UNITS: tl.constexpr
):
    """A group's share of the output [BN, BM] from its product with the codes, which is `part` times UNITS."""
    scale = tl.load(scales + g * NP + n).to(tl.float32)
    zero = tl.load(zeros + g * NP + n).to(tl.float32) * ZERO_STEP + ZERO_BASE
    total = tl.load(sums + g * MP + m)
    return part * (scale * UNITS)[:, None] - (scale * zero)[:, None] * total[None, :]


@triton.jit
def half_run(
    words,
    columns,
    sums,
    scales,
    zeros,
    n,
    m,
    NP,
    MP,
    first,
    last,
    BITS: tl.constexpr,
    STEP_UNITS: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    ASM: tl.constexpr,
):
    """run_of_steps with float16 columns."""
    SETS: tl.constexpr = 3 if BITS == 3 else 1
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PER_GROUP: tl.constexpr = PLANES // GROUPS_PER_STEP
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first, last):
        planes = step_planes(words + step * (STEP_UNITS * SETS * 1024), BITS, ASM)
        at = columns + step * (STEP_UNITS * PLANES * 16)
        if PER_CHANNEL:
            for p in tl.static_range(PLANES):
                acc = tl.dot(planes[p], tl.load(at + p * 16), acc)
        else:
            for g in tl.static_range(GROUPS_PER_STEP):
                part = tl.zeros((BN, BM), tl.float32)
                for p in tl.static_range(PER_GROUP):
                    part = tl.dot(planes[g * PER_GROUP + p], tl.load(at + (g * PER_GROUP + p) * 16), part)
                acc += scaled(
                    part, sums, scales, zeros, step * GROUPS_PER_STEP + g, n, m, NP, MP,
                    ZERO_BASE, ZERO_STEP, SUBNORMALS,
                )  # fmt: skip
    return acc


@triton.jit
def integer_run(
    words,
    columns,
    sums,
    scales,
    zeros,
    n,
    m,
    NP,
    MP,
    first,
    last,
    BITS: tl.constexpr,
    STEP_UNITS: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    ASM: tl.constexpr,
):
    """half_run with int8 columns and the words as bytes. A step is one group but at 3 bits; PER_CHANNEL not at 8 bits,
    whose codes need sums."""
    FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    SETS: tl.constexpr = 3 if BITS == 3 else 1
    PER_GROUP: tl.constexpr = FIELDS // GROUPS_PER_STEP
    acc = tl.zeros((BN, BM), tl.float32)
    part = tl.zeros((BN, BM), tl.int32)
    for step in range(first, last):
        b = tl.load(words + step * (STEP_UNITS * SETS * 2048), eviction_policy="evict_first")
        at = columns + step * (STEP_UNITS * FIELDS * 32)
        if BITS == 3:
            second = tl.load(words + step * 6144 + 2048, eviction_policy="evict_first")
            third = tl.load(words + step * 6144 + 4096, eviction_policy="evict_first")
            fields = bytes_3(b, second, third, ASM)
        elif BITS == 2:
            fields = bytes_2(b, ASM)
        elif BITS == 4:
            fields = bytes_4(b, ASM)
        else:
            fields = (bytes_8(b, ASM),)
        for g in tl.static_range(GROUPS_PER_STEP):
            if not PER_CHANNEL:
                part = tl.zeros((BN, BM), tl.int32)
            if BITS == 8:
                # What the codes lost to be int8.
                part += (tl.load(sums + step * MP + m) * 128.0).to(tl.int32)[None, :]
            for f in tl.static_range(PER_GROUP):
                columns_of = tl.load(at + (g * PER_GROUP + f) * 32)
                part = tl.dot(fields[g * PER_GROUP + f], columns_of, part, out_dtype=tl.int32)
            if not PER_CHANNEL:
                acc += scaled(
                    part.to(tl.float32), sums, scales, zeros, step * GROUPS_PER_STEP + g, n, m, NP, MP,
                    ZERO_BASE, ZERO_STEP, 1.0,
                )  # fmt: skip
    if PER_CHANNEL:
        acc = part.to(tl.float32) / SUBNORMALS
    return acc


@triton.jit
def run_of_steps(
    words, columns, sums, scales, zeros, n, m, NP, MP, first, last,
    BITS: tl.constexpr, STEP_UNITS: tl.constexpr, GROUPS_PER_STEP: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr, ZERO_STEP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Product [BN, BM] over steps first .. last - 1, scaled by group; codes times 2^-24 only when PER_CHANNEL."""
    if columns.dtype.element_ty == tl.int8:
        return integer_run(
            words, columns, sums, scales, zeros, n, m, NP, MP, first, last,
            BITS, STEP_UNITS, GROUPS_PER_STEP, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BN, BM, ASM,
        )  # fmt: skip
    else:
        return half_run(
            words, columns, sums, scales, zeros, n, m, NP, MP, first, last,
            BITS, STEP_UNITS, GROUPS_PER_STEP, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BN, BM, ASM,
        )  # fmt: skip


@triton.jit
def qlinear_kernel(
    half,
    sums,
    factors,
    codes,
    scales,
    zeros,
    bias,
    residual,
    y,
    M,
    N,
    MP,
    NP,
    KP,
    STEPS,
    RUN,
    BITS: tl.constexpr,
    STEP_UNITS: tl.constexpr,
    GROUPS_PER_STEP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    ASM: tl.constexpr,
):
    """half [MP, KP] x codes -> y [M, N], or with PARTIAL one run of RUN steps a program -> y [SPLITS, M, N] float32.

    MP is a multiple of BM, NP of BN; padding needs no masks but the last store's.
    """
    pn = tl.program_id(0)
    pm = tl.program_id(1)
    row = tl.arange(0, BN)
    n = pn * BN + row
    m = pm * BM + tl.arange(0, BM)
    SETS: tl.constexpr = 3 if BITS == 3 else 1
    UNIT: tl.constexpr = 256 if BITS == 3 else 256 // BITS
    # Of `codes`, in a row of a word set: bytes where columns are, else words.
    ACROSS: tl.constexpr = 32 if half.dtype.element_ty == tl.int8 else 16
    c = tl.arange(0, STEP_UNITS * ACROSS)
    tile_words = STEPS * (STEP_UNITS * SETS * 64 * ACROSS)
    words = (
        codes
        + (pn * (BN // 64)).to(tl.int64) * tile_words
        + ((row // 64) * tile_words + (row % 64) * ACROSS)[:, None]
        + ((c // ACROSS) * (SETS * 64 * ACROSS) + c % ACROSS)[None, :]
    )
    columns = half + ((c // ACROSS) * UNIT + c % ACROSS)[:, None] + m.to(tl.int64)[None, :] * KP
    if PARTIAL:
        split = tl.program_id(2)
        first = split * RUN
        total = run_of_steps(
            words, columns, sums, scales, zeros, n, m, NP, MP, first, tl.minimum(first + RUN, STEPS),
            BITS, STEP_UNITS, GROUPS_PER_STEP, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BN, BM, ASM,
        )  # fmt: skip
    elif SPLITS == 1:
        total = run_of_steps(
            words, columns, sums, scales, zeros, n, m, NP, MP, 0, STEPS,
            BITS, STEP_UNITS, GROUPS_PER_STEP, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BN, BM, ASM,
        )  # fmt: skip
    else:
        total = tl.zeros((BN, BM), tl.float32)
        for split in range(SPLITS):
            first = split * RUN
            total += run_of_steps(
                words, columns, sums, scales, zeros, n, m, NP, MP, first, tl.minimum(first + RUN, STEPS),
                BITS, STEP_UNITS, GROUPS_PER_STEP, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BN, BM, ASM,
            )  # fmt: skip
    inside = (n < N)[:, None] & (m < M)[None, :]
    out = m.to(tl.int64)[None, :] * N + n[:, None]
    if PARTIAL:
        tl.store(y + tl.program_id(2).to(tl.int64) * M * N + out, total, mask=inside)
    else:
        if PER_CHANNEL:
            total = scaled(total, sums, scales, zeros, 0, n, m, NP, MP, ZERO_BASE, ZERO_STEP, SUBNORMALS)
        total *= tl.load(factors + m)[None, :]
        if BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:
            total += tl.load(residual + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finished(
    runs,
    sums,
    factors,
    scales,
    zeros,
    bias,
    m,
    n,
    inside,
    M,
    N,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Columns n of row m of a product, float32: read from y [M, N], or with PARTIAL made of runs [SPLITS, M, N],
    added in ascending order and ended as qlinear_kernel ends. Zero outside `inside`."""
    # The long part of an address is one number for all columns: a 64-bit one for each would fill the registers.
    row = runs + m.to(tl.int64) * N
    if PARTIAL:
        total = tl.zeros(n.shape, tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(row + tl.cast(split, tl.int64) * M * N + n, mask=inside, other=0.0)
        if PER_CHANNEL:
            scale = tl.load(scales + n, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros + n, mask=inside, other=0.0).to(tl.float32) * ZERO_STEP + ZERO_BASE
            total = total * (scale * SUBNORMALS) - (scale * zero) * tl.load(sums + m, mask=m < M, other=0.0)
        total *= tl.load(factors + m, mask=m < M, other=0.0)
        if BIAS:
            total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        return tl.where(inside, total, 0.0)
    else:
        return tl.load(row + n, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def reduce_kernel(
    runs,
    sums,
    factors,
    scales,
    zeros,
    bias,
    residual,
    y,
    M,
    N,
    SPLITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """runs [SPLITS, M, N] -> y [M, N]; programs (blocks of N, M)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    inside = n < N
    total = finished(
        runs, sums, factors, scales, zeros, bias, m, n, inside, M, N,
        SPLITS, True, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
    )  # fmt: skip
    at = m.to(tl.int64) * N + n
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
