"""The ops between the products of a block, each in one launch with the sum of the product before it and the preparation
of the product after it (device/fused.py). A layer is then ten launches:

    norm_prepared, qkv, rope_kv_write_of, attention, attended_prepared, o, norm_prepared, gate_up, silu_prepared, down

The numbers are those of the single ops, up to the order in which a row's squares are added. Activations are float32.
The caller has the shapes right: they come from the weights of one model, not from outside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dibit.kernels.formats import PER_CHANNEL
from dibit.kernels.rope import check_rope_kv_write
from dibit.kernels.triton.attention import Attended, joined
from dibit.kernels.triton.device.fused import attended_prepare_kernel, norm_prepare_kernel, silu_prepare_kernel
from dibit.kernels.triton.device.small import rope_kv_write_kernel
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.qlinear import Prepared, Runs, finish, launch_runs, plan_of

MAX_COLUMNS = 16384
"""Columns of a row that one program holds: 16 a thread of 1024. Twice that spills, counted."""

MAX_JOINED_COLUMNS = 4096
"""Columns of attention's result whose splits one program joins; wider rows, which would spill, get a launch for it."""

_REALS = (torch.float32, torch.float16, torch.bfloat16)


def product(x: Prepared, w: TritonQWeight, bias: Tensor | None) -> Runs:
    """x · dequantize(w)ᵀ + bias, its runs perhaps not added up; `x` was prepared for `w`."""
    return launch_runs(x, w, plan_of(w, x.tokens), bias=bias)


def finished(runs: Runs) -> Tensor:
    """The product as [M, N] float32."""
    if not runs.plan.partial:
        return runs.target
    y = torch.empty(runs.prepared.tokens, runs.weight.n, dtype=torch.float32, device=runs.target.device)
    finish(runs, y)
    return y


def norm_prepared(x: Tensor | Runs, residual: Tensor | None, norm: Tensor, eps: float, w: TritonQWeight) -> Prepared:
    """rms_norm(x (+ residual)) * norm for products with `w`; the sum is written over `residual` [M, K]."""
    tokens = x.shape[0] if isinstance(x, Tensor) else x.prepared.tokens
    made = _room(w, tokens)
    if tokens:
        norm_prepare_kernel[(made.half.shape[0],)](
            *_operands(x),
            residual,
            norm,
            made.half,
            made.sums,
            made.factors,
            eps,
            *_sizes(made, w),
            ADD=residual is not None,
            **_end(x),
            **_row(w),
        )
    return made


def silu_prepared(gate_up: Runs, w: TritonQWeight) -> Prepared:
    """silu(gate) * up of gate_up [M, 2 K] for products with `w`."""
    made = _room(w, gate_up.prepared.tokens)
    if made.tokens:
        silu_prepare_kernel[(made.half.shape[0],)](
            *_operands(gate_up), made.half, made.sums, made.factors, *_sizes(made, w), **_end(gate_up), **_row(w)
        )
    return made


def attended_prepared(attended: Attended, w: TritonQWeight) -> Prepared:
    """The result of attention [M, H D] for products with `w`."""
    if attended.partial and row_block(w) > MAX_JOINED_COLUMNS:
        attended = joined(attended)
    made = _room(w, attended.tokens)
    if made.tokens:
        attended_prepare_kernel[(made.half.shape[0],)](
            attended.target,
            attended.weights,
            made.half,
            made.sums,
            made.factors,
            *_sizes(made, w),
            attended.splits,
            attended.head_dim,
            PARTIAL=attended.partial,
            **_row(w),
        )
    return made


def rope_kv_write_of(
    qkv: Runs,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
) -> Tensor:
    """rope_kv_write of a product whose runs may not be added up: returns q [T, H D]."""
    _, kv_heads, block_size, d = k_cache.shape
    t = qkv.prepared.tokens
    # Runs of a product have the shape of its first one.
    seen = qkv.target[0] if qkv.plan.partial else qkv.target
    check_rope_kv_write(seen, positions, cos, sin, k_cache, v_cache, slots, heads, reals=_REALS, cache_reals=_REALS)
    q = torch.empty(t, heads * d, dtype=torch.float32, device=seen.device)
    if t:
        rope_kv_write_kernel[(heads + 2 * kv_heads, t)](
            *_operands(qkv),
            positions,
            cos,
            sin,
            k_cache,
            v_cache,
            slots,
            q,
            t,
            heads,
            kv_heads,
            block_size,
            cos.shape[1],
            d,
            **_end(qkv),
            BLOCK_D=triton.next_power_of_2(d),
            num_warps=1,
        )
    return q


def row_block(w: TritonQWeight) -> int:
    """Columns of the block that a row for `w` fills."""
    block: int = triton.next_power_of_2(w.geometry.columns)
    return max(256, block)


def row_warps(block: int) -> int:
    """Eight columns a thread, while a program can have as many threads."""
    return min(32, max(4, block // 256))


def _room(w: TritonQWeight, tokens: int) -> Prepared:
    geometry, device = w.geometry, w.codes.device
    padded = plan_of(w, tokens).padded_tokens(tokens)
    return Prepared(
        torch.empty(padded, geometry.columns, dtype=torch.float16, device=device),
        torch.empty(geometry.groups, padded, dtype=torch.float32, device=device),
        torch.empty(padded, dtype=torch.float32, device=device),
        tokens,
    )


def _sizes(made: Prepared, w: TritonQWeight) -> tuple[int, int, int, int, int]:
    return made.tokens, made.half.shape[0], w.k, w.geometry.columns, w.geometry.groups


def _row(w: TritonQWeight) -> dict[str, Any]:
    block = row_block(w)
    return {
        "BITS": w.format.bits,
        "GROUP": max(0, w.format.group_size),
        "BLOCK": block,
        "num_warps": row_warps(block),
        "num_stages": 1,
    }


def _operands(x: Tensor | Runs) -> tuple[Tensor | None, ...]:
    """The first arguments of `finished` on the device."""
    if isinstance(x, Tensor):
        return x, None, None, None, None, None
    return x.target, x.prepared.sums, x.prepared.factors, x.weight.scales, x.weight.zeros, x.bias


def _end(x: Tensor | Runs) -> dict[str, Any]:
    """The last arguments of `finished` on the device."""
    if isinstance(x, Tensor) or not x.plan.partial:
        # What a finished product was made of would only be another kernel to compile.
        names = {"SPLITS": 1, "PARTIAL": False, "PER_CHANNEL": False, "BIAS": False}
        return {**names, "ZERO_BASE": 0.0, "ZERO_STEP": 1.0}
    zero_base, zero_step = x.weight.format.zero_line
    return {
        "SPLITS": x.plan.splits,
        "PARTIAL": True,
        "PER_CHANNEL": x.weight.format.group_size == PER_CHANNEL,
        "BIAS": x.bias is not None,
        "ZERO_BASE": zero_base,
        "ZERO_STEP": zero_step,
    }
