"""A draw from each row of scores without sorting it: weights, two searches for a bar, and the place of a number.

A weight lies in [0, 1], so its float32 bits have 30 digits that are ordered as it is: six steps of five binary digits
find the bar that top_k sets (a count of weights at or above it), and six the bar of top_p (their sum). A step counts
what lies at or above 32 candidates at once and leaves one of 32 ranges. Programs share a row; what they find is added up
in 64-bit integers, sums of weights too (in units of 2^-44), so the order in which they come does not matter.

The weights are those of csrc/sample.cpp bit for bit: the same operations, none of them fused. Only sums differ: there
they are float64, here integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT: tl.constexpr = tl.constexpr(17592186044416.0)
"""A weight of 1 in whole units; 2^18 of them fit 64 bits."""
LEAST_TEMPERATURE: tl.constexpr = tl.constexpr(1e-6)
STEPS: tl.constexpr = tl.constexpr(6)
DIGIT: tl.constexpr = tl.constexpr(5)
RANGES: tl.constexpr = tl.constexpr(32)
END: tl.constexpr = tl.constexpr(12)
"""Where the entry of the draw itself stands, after those of both searches' steps."""


@triton.jit
def exp_of(x):
    """e^x for x <= 0 as the C++ library rounds it: 0 below -87, NaN stays NaN."""
    shifted = x * 1.44269502162933349609375 + 12582912.0
    n = shifted - 12582912.0
    r = n * 0.0002121944417012855410575866699218750 + (n * -0.693359375 + x)
    p = 0.0013815178303048014640808105468750 * r + 0.00836894753575325012207031250
    p = p * r + 0.04166840389370918273925781250
    p = p * r + 0.1666651666164398193359375
    p = p * r + 0.49999994039535522460937500
    p = (r * r) * p + r + 1.0
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, p * power)


@triton.jit
def units(weights):
    return (weights * UNIT).to(tl.int64)


@triton.jit
def weigh_kernel(scores, peaks, settings, weights, tallies, R, V, BLOCK: tl.constexpr):
    """weights [R, V] = e^((scores - peak) / temperature), 0 below min_p and in rows without a finite peak; tallies
    [R, 12, 32] = 0. Programs (R, blocks of V)."""
    r = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.maximum(tl.load(settings + r).to(tl.float32), LEAST_TEMPERATURE)
    least = tl.load(settings + R + r).to(tl.float32)
    s = tl.load(scores + r * V + v, mask=v < V, other=float("-inf"))
    w = exp_of(tl.div_rn(s - tl.load(peaks + r), temperature))
    # Also false for NaN.
    tl.store(weights + r * V + v, tl.where((w >= least) & (w <= 1.0), w, 0.0), mask=v < V)
    if tl.program_id(1) == 0:
        at = tl.arange(0, 2 * STEPS * RANGES if False else 512)
        tl.store(tallies + r * (END * RANGES) + at, tl.zeros([512], tl.int64), mask=at < END * RANGES)
