"""What stands between two products of a block, in one launch each: the runs of the product before are added, the op is
done, and the activations of the product after are stored as it wants them (`store_prepared`).

One program a token, its row in registers from end to end. A row is read as `finished` reads it, so nothing here
depends on how many tokens there are. Rows M .. MP - 1 are padding and become zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.kernels.triton.device.prepare import store_prepared
from dibit.kernels.triton.device.qlinear import finished


@triton.jit
def norm_prepare_kernel(
    x,
    x_sums,
    x_factors,
    scales,
    zeros,
    bias,
    residual,
    weight,
    half,
    sums,
    factors,
    eps,
    M,
    MP,
    K,
    KP,
    GROUPS,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
):
    """rms_norm(x (+ residual)) * weight, prepared; with ADD the sum is written over `residual` [M, K]."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = (k < K) & (m < M)
    h = finished(
        x, x_sums, x_factors, scales, zeros, bias, m, k, inside, M, K,
        SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
    )  # fmt: skip
    if ADD:
        at = residual + m.to(tl.int64) * K + k
        h += tl.load(at, mask=inside, other=0.0)
        tl.store(at, h, mask=inside)
    scale = tl.rsqrt(tl.sum(h * h, 0) / K + eps)
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(inside, h * scale * w, 0.0)
    store_prepared(y, m, half, sums, factors, MP, KP, GROUPS, BITS, GROUP, BLOCK, QMAX)


@triton.jit
def silu_prepare_kernel(
    x,
    x_sums,
    x_factors,
    scales,
    zeros,
    bias,
    half,
    sums,
    factors,
    M,
    MP,
    K,
    KP,
    GROUPS,
    SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QMAX: tl.constexpr,
):
    """silu(gate) * up, prepared, of x = gate_up [M, 2 K]."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = (k < K) & (m < M)
    gate = finished(
        x, x_sums, x_factors, scales, zeros, bias, m, k, inside, M, 2 * K,
        SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
    )  # fmt: skip
    up = finished(
        x, x_sums, x_factors, scales, zeros, bias, m, K + k, inside, M, 2 * K,
        SPLITS, PARTIAL, PER_CHANNEL, ZERO_BASE, ZERO_STEP, BIAS,
    )  # fmt: skip
    store_prepared(
        gate / (1.0 + tl.exp(-gate)) * up, m, half, sums, factors, MP, KP, GROUPS, BITS, GROUP, BLOCK, QMAX
    )  # fmt: skip
