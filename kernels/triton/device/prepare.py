"""Activations as the low-bit product wants them: float16, scaled, with the sums that zero points multiply.

For every token m, with e_m such that the largest |x| / 2^e_m lies in [2^14, 2^15):

    half[m, k]   float16(x[m, k] / 2^e_m) / 2^plane_shift     the plane's shift is taken out here, not in the product
    sums[g, m]   sum over group g of half[m, k] * 2^plane_shift, float32
    factors[m]   2^e_m

A power of two per token keeps bfloat16 and float32 activations of any size exact to float16's 11 bits. A NaN or an
infinity stays one and makes the token's whole row of the product NaN.

With QMAX, 2^(bits - 1) - 1 of rounded activations, a token's numbers are the integers of `quantize_activations`
instead, and its factor is their scale. Integers up to 127 are float16 numbers: the same product multiplies them.
Where `half` is int8 they are stored as they are, for integer products, in the order of `byte_place`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponent_for(largest):
    """e_m of a row whose largest magnitude is `largest`."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    return tl.minimum(tl.maximum(exponent - 127 - 14, -100), 100)


@triton.jit
def power_of_two(e):
    return ((127 + e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def poison_of(v):
    """NaN where v is not finite, else 0."""
    return tl.where(tl.abs(v) < float("inf"), 0.0, float("nan"))


@triton.jit
def factor_of(largest, poison, QMAX: tl.constexpr):
    """factors[m] of a row whose largest magnitude is `largest`; `poison` is NaN where the row has a NaN or infinity."""
    if QMAX == 0:
        return power_of_two(exponent_for(largest))
    else:
        return tl.div_rn(largest, tl.full(largest.shape, QMAX, tl.float32)) + poison


@triton.jit
def operand_of(v, largest, factor, QMAX: tl.constexpr):
    """v as a multiple of the row's factor that float16 holds, in float32."""
    if QMAX == 0:
        return (v * power_of_two(-exponent_for(largest))).to(tl.float16).to(tl.float32)
    else:
        y = tl.div_rn(v, tl.zeros_like(v) + tl.where(factor > 0.0, factor, 1.0))
        y = tl.where(y == y, tl.minimum(tl.maximum(y, -1.0 * QMAX), 1.0 * QMAX), 0.0)
        # Rounds a float32 below 2^22 to the nearest integer, halves to even.
        return y + 12582912.0 - 12582912.0


@triton.jit
def plane_shifts(at, BITS: tl.constexpr):
    """The power of two by which the activation of column `at` is divided."""
    if BITS == 8:
        shift = tl.full(at.shape, 1.0, tl.float32)
    elif BITS == 3:
        shift = tl.where((at % 256) // 16 % 5 % 2 == 1, 8.0, 1.0)
    else:
        shift = tl.where(at // 16 % 2 == 1, 1.0 * (1 << BITS), 1.0)
    return shift


@triton.jit
def byte_place(at, BITS: tl.constexpr):
    """Where the activation of column `at` stands for integer products: 32 columns for each field of a unit's bytes.
    Word r of a unit is bytes 2 r and 2 r + 1, and plane p a field of one of them. At 3 bits, where planes cross bytes,
    a field is made of two neighbouring planes, as it is at 8 bits, so that it lies in one group of any size."""
    FIELDS: tl.constexpr = 1 if BITS == 3 else 8 // BITS
    UNIT: tl.constexpr = 32 * FIELDS
    plane = at % UNIT // 16
    return at // UNIT * UNIT + plane % FIELDS * 32 + at % 16 * 2 + plane // FIELDS


@triton.jit
def store_operand(operand, half, at, inside, BITS: tl.constexpr):
    """Store a row's operands at the columns `at`; returns what was stored, the planes' shifts undone."""
    if half.dtype.element_ty == tl.int8:
        tl.store(half + byte_place(at, BITS), operand.to(tl.int8), mask=inside)
        return operand
    else:
        shift = plane_shifts(at, BITS)
        # 16-bit rounding first: the quotient by the plane's shift is then exact for all but the tiniest values.
        h = (operand / shift).to(tl.float16)
        tl.store(half + at, h, mask=inside)
        return h.to(tl.float32) * shift


@triton.jit
def store_group_sums(back, first, m, sums, MP, GROUPS, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Store the sums of whole groups, from the one of column `first` on; back [BLOCK]."""
    g = first // GROUP + tl.arange(0, BLOCK // GROUP)
    tl.store(sums + g * MP + m, tl.sum(tl.reshape(back, (BLOCK // GROUP, GROUP)), 1), mask=g < GROUPS)


@triton.jit
def prepare_row(
    x,
    m,
    half,
    sums,
    factors,
    M,
    MP,
    K,
    KP,
    GROUPS,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
):
    """Row m of x [M, K], or of the padding, by one program; as prepare_kernel."""
    k = tl.arange(0, BLOCK)
    row = x + m.to(tl.int64) * K
    most = tl.zeros((BLOCK,), tl.float32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        v = tl.load(row + start + k, mask=(start + k < K) & (m < M), other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(v))
        if QMAX > 0:
            poison += poison_of(v)
    largest = tl.max(most, 0)
    factor = factor_of(largest, tl.sum(poison, 0), QMAX)
    tl.store(factors + m, factor)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, KP, BLOCK):
        at = start + k
        v = tl.load(row + at, mask=(at < K) & (m < M), other=0.0).to(tl.float32)
        operand = operand_of(v, largest, factor, QMAX)
        back = store_operand(operand, half + m.to(tl.int64) * KP, at, at < KP, BITS)
        if GROUP == 0:
            total += tl.sum(back, 0)
        else:
            store_group_sums(back, start, m, sums, MP, GROUPS, GROUP, BLOCK)
    if GROUP == 0:
        tl.store(sums + m + tl.arange(0, 1), total)


@triton.jit
def prepare_kernel(
    x,
    half,
    sums,
    factors,
    M,
    MP,
    K,
    KP,
    GROUPS,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
):
    """One token a program. x [M, K] -> half [MP, KP], sums [GROUPS, MP], factors [MP]; rows M.. become zeros.

    GROUP 0 is one group a row. BLOCK is a multiple of 256, so of every unit and group.
    """
    prepare_row(
        x, tl.program_id(0), half, sums, factors, M, MP, K, KP, GROUPS, BITS, GROUP, BLOCK, QMAX
    )  # fmt: skip


@triton.jit
def store_prepared(
    v,
    m,
    half,
    sums,
    factors,
    MP,
    KP,
    GROUPS,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
):
    """What prepare_kernel stores of a row, for one that is in registers already: v [BLOCK] float32, zero from K on.

    BLOCK is a multiple of 256 and at least KP.
    """
    at = tl.arange(0, BLOCK)
    largest = tl.max(tl.abs(v), 0)
    factor = factor_of(largest, tl.sum(poison_of(v), 0) if QMAX > 0 else 0.0, QMAX)
    tl.store(factors + m, factor)
    operand = operand_of(v, largest, factor, QMAX)
    back = store_operand(operand, half + m.to(tl.int64) * KP, at, at < KP, BITS)
    if GROUP == 0:
        tl.store(sums + m, tl.sum(back, 0))
    else:
        store_group_sums(back, 0, m, sums, MP, GROUPS, GROUP, BLOCK)
