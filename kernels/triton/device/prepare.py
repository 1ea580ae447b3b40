"""Activations as the low-bit product wants them: float16, scaled, with the sums that zero points multiply.

For every token m, with e_m such that the largest |x| / 2^e_m lies in [2^14, 2^15):

    half[m, k]   float16(x[m, k] / 2^e_m) / 2^plane_shift     the plane's shift is taken out here, not in the product
    sums[g, m]   sum over group g of half[m, k] * 2^plane_shift, float32
    factors[m]   2^e_m

A power of two per token keeps bfloat16 and float32 activations of any size exact to float16's 11 bits. A NaN or an
infinity stays one and makes the token's whole row of the product NaN.
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
def prepare_kernel(
    x, half, sums, factors, M, MP, K, KP, GROUPS, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """One token a program. x [M, K] -> half [MP, KP], sums [GROUPS, MP], factors [MP]; rows M.. become zeros.

    GROUP 0 is one group a row. BLOCK is a multiple of 256, so of every unit and group.
    """
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    row = x + m.to(tl.int64) * K
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        v = tl.load(row + start + k, mask=(start + k < K) & (m < M), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(v))
    e = exponent_for(tl.max(largest, 0))
    down = power_of_two(-e)
    tl.store(factors + m, power_of_two(e))
    total = tl.zeros((1,), tl.float32)
    for start in range(0, KP, BLOCK):
        at = start + k
        v = tl.load(row + at, mask=(at < K) & (m < M), other=0.0).to(tl.float32) * down
        shift = plane_shifts(at, BITS)
        # 16-bit rounding first: the quotient by the plane's shift is then exact for all but the tiniest values.
        h = (v.to(tl.float16).to(tl.float32) / shift).to(tl.float16)
        tl.store(half + m.to(tl.int64) * KP + at, h, mask=at < KP)
        back = h.to(tl.float32) * shift
        if GROUP == 0:
            total += tl.sum(back, 0)
        else:
            per_group = tl.sum(tl.reshape(back, (BLOCK // GROUP, GROUP)), 1)
            g = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(sums + g * MP + m, per_group, mask=g < GROUPS)
    if GROUP == 0:
        tl.store(sums + m + tl.arange(0, 1), total)


@triton.jit
def store_prepared(
    v, m, half, sums, factors, MP, KP, GROUPS, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """What prepare_kernel stores of a row, for one that is in registers already: v [BLOCK] float32, zero from K on.

    BLOCK is a multiple of 256 and at least KP.
    """
    at = tl.arange(0, BLOCK)
    e = exponent_for(tl.max(tl.abs(v), 0))
    tl.store(factors + m, power_of_two(e))
    shift = plane_shifts(at, BITS)
    h = ((v * power_of_two(-e)).to(tl.float16).to(tl.float32) / shift).to(tl.float16)
    tl.store(half + m.to(tl.int64) * KP + at, h, mask=at < KP)
    back = h.to(tl.float32) * shift
    if GROUP == 0:
        tl.store(sums + m, tl.sum(back, 0))
    else:
        g = tl.arange(0, BLOCK // GROUP)
        tl.store(sums + g * MP + m, tl.sum(tl.reshape(back, (BLOCK // GROUP, GROUP)), 1), mask=g < GROUPS)
