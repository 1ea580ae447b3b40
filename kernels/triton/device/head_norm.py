"""The norms of a token's query and key heads: one program a head, in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_norm_kernel(qkv, q_norm, k_norm, eps, WIDTH, HEADS, D, BLOCK_D: tl.constexpr):
    """qkv [T, WIDTH] of heads of D <= BLOCK_D columns; programs (H + KH, T), the first HEADS of them queries."""
    head, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    at = qkv + t * WIDTH + head * D + d
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    # Two loads, one of which is of nothing: a choice between pointers would not vectorize.
    query = head < HEADS
    weight = tl.load(q_norm + d, mask=inside & query, other=0.0) + tl.load(k_norm + d, mask=inside & ~query, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(at, (x * scale * weight).to(qkv.dtype.element_ty), mask=inside)
