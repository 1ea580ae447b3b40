"""The ops between the products of a block, each in one launch with the sum of the product before it and the preparation
of the product after it (device/fused.py). Where every sequence has one token that is attention too (decode.py), and a
layer is eight launches:

    norm_prepared, qkv, decode_attended, o, norm_prepared, gate_up, silu_prepared, down

Else rope_kv_write (small.py), attention and attended_prepared stand in its place, with the same numbers.

The numbers are those of the single ops, up to the order in which a row's squares are added. Activations are float32,
prepared as they are, or where a product has `activation_bits` as integers of that width.
The caller has the shapes right: they come from the weights of one model, not from outside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dibit.kernels.triton.attention import Attended, joined
from dibit.kernels.triton.device.fused import norm_prepare_kernel, silu_prepare_kernel
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.qlinear import (
    Prepared,
    Runs,
    constants_of,
    finish,
    integers_of,
    launch_runs,
    operands_of,
    plan_of,
    prepare,
    qmax_of,
)

MAX_COLUMNS = 16384
"""Columns of a row that one program holds: 16 a thread of 1024. Twice that spills, counted."""


def product(x: Prepared, w: TritonQWeight, bias: Tensor | None) -> Runs:
    """x · dequantize(w)ᵀ + bias, its runs perhaps not added up; `x` was prepared for `w`."""
    return launch_runs(x, w, plan_of(w, x.tokens, integers=x.integers), bias=bias)


def finished(runs: Runs) -> Tensor:
    """The product as [M, N] float32."""
    if not runs.plan.partial:
        return runs.target
    y = torch.empty(runs.prepared.tokens, runs.weight.n, dtype=torch.float32, device=runs.target.device)
    finish(runs, y)
    return y


def norm_prepared(
    x: Tensor | Runs,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    w: TritonQWeight,
    *,
    activation_bits: int | None = None,
) -> Prepared:
    """rms_norm(x (+ residual)) * norm for products with `w`; the sum is written over `residual` [M, K]."""
    tokens = x.shape[0] if isinstance(x, Tensor) else x.prepared.tokens
    made = room(w, tokens, activation_bits)
    if tokens:
        norm_prepare_kernel[(made.half.shape[0],)](
            *operands_of(x),
            residual,
            norm,
            made.half,
            made.sums,
            made.factors,
            eps,
            *_sizes(made, w),
            ADD=residual is not None,
            **constants_of(x),
            **_row(w, activation_bits),
        )
    return made


def silu_prepared(gate_up: Runs, w: TritonQWeight, *, activation_bits: int | None = None) -> Prepared:
    """silu(gate) * up of gate_up [M, 2 K] for products with `w`."""
    made = room(w, gate_up.prepared.tokens, activation_bits)
    if made.tokens:
        silu_prepare_kernel[(made.half.shape[0],)](
            *operands_of(gate_up),
            made.half,
            made.sums,
            made.factors,
            *_sizes(made, w),
            **constants_of(gate_up),
            **_row(w, activation_bits),
        )
    return made


def attended_prepared(attended: Attended, w: TritonQWeight, *, activation_bits: int | None = None) -> Prepared:
    """The result of attention [M, H D] for products with `w`."""
    integers = integers_of(w, attended.tokens, activation_bits)
    padded = plan_of(w, attended.tokens, integers=integers).padded_tokens(attended.tokens)
    return prepare(
        joined(attended).target, w, padded_tokens=padded, activation_bits=activation_bits, integers=integers
    )  # fmt: skip


def room(w: TritonQWeight, tokens: int, activation_bits: int | None) -> Prepared:
    """Where `tokens` activations for products with `w` go."""
    integers = integers_of(w, tokens, activation_bits)
    padded = plan_of(w, tokens, integers=integers).padded_tokens(tokens)
    return Prepared.empty(w, tokens, padded, integers=integers)


def row_block(w: TritonQWeight) -> int:
    """Columns of the block that a row for `w` fills."""
    block: int = triton.next_power_of_2(w.geometry.columns)
    return max(256, block)


def row_warps(block: int) -> int:
    """Eight columns a thread, while a program can have as many threads."""
    return min(32, max(4, block // 256))


def _sizes(made: Prepared, w: TritonQWeight) -> tuple[int, int, int, int, int]:
    return made.tokens, made.half.shape[0], w.k, w.geometry.columns, w.geometry.groups


def _row(w: TritonQWeight, activation_bits: int | None) -> dict[str, Any]:
    block = row_block(w)
    return {
        "BITS": w.format.bits,
        "GROUP": max(0, w.format.group_size),
        "BLOCK": block,
        "QMAX": qmax_of(activation_bits),
        "num_warps": row_warps(block),
        "num_stages": 1,
    }
