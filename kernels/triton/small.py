"""The small ops of a step on NVIDIA GPUs (device/small.py). Contracts in norm.py, activation.py, rope.py, embedding.py
and argmax.py; `residual` is overwritten by add_rms_norm, as its contract allows.

What another backend refuses after a look at values, a position outside the tables or a slot outside the cache, is
trusted here: looking would stop the queue. A token id outside an embedding gives a row of NaN, which the sampler
reports for the one request it belongs to.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dibit.kernels.contract import ContractError, Dims
from dibit.kernels.formats import PER_CHANNEL
from dibit.kernels.kv import head_dim
from dibit.kernels.rope import check_rope_kv_write
from dibit.kernels.triton.cache import TYPES, Side, block_columns
from dibit.kernels.triton.device.small import (
    block_argmax_kernel,
    embedding_kernel,
    norm_kernel,
    rope_kv_write_kernel,
    row_argmax_kernel,
    silu_mul_kernel,
)
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.qlinear import Runs, constants_of, operands_of

MAX_NORM_COLUMNS = 65536
_REALS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024
ARGMAX_BLOCK = 4096


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, K], weight [K] -> [T, K] of the dtype of x."""
    return _norm("rms_norm", x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), both [T, K]; the sum is written over `residual`."""
    return _norm("add_rms_norm", x, residual, weight, eps), residual


def _norm(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    dims = Dims(op)
    dims.check("x", x, "T K", _REALS)
    dims.check("weight", weight, "K", _REALS)
    if residual is not None:
        dims.check("residual", residual, "T K", (x.dtype,))
    t, k = x.shape
    if k > MAX_NORM_COLUMNS:
        raise ContractError(f"{op}: rows of {k} columns; at most {MAX_NORM_COLUMNS} fit one program")
    y = torch.empty_like(x)
    if t:
        block = triton.next_power_of_2(k)
        norm_kernel[(t,)](
            x,
            residual,
            weight,
            y,
            residual,
            eps,
            k,
            ADD=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> [T, I], silu(gate) * up."""
    Dims("silu_mul").check("gate_up", gate_up, "T W", _REALS)
    t, width = gate_up.shape
    if width % 2:
        raise ContractError(f"silu_mul: gate_up has {width} columns; expected an even number")
    y = torch.empty(t, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        silu_mul_kernel[(triton.cdiv(width // 2, BLOCK), t)](gate_up, y, width // 2, BLOCK=BLOCK, num_warps=4)
    return y


def rope_kv_write(
    qkv: Tensor | Runs,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
) -> Tensor:
    """Rotate q and k, store k and v at `slots` (-1 stores nothing), return q [T, H D].

    `qkv` may be a product whose runs are not added up.
    """
    kv_heads, block_size, d = k_cache.shape[1], k_cache.shape[2], head_dim(k_cache)
    # Runs of a product have the shape of its first one.
    seen = qkv if isinstance(qkv, Tensor) else qkv.target[0] if qkv.plan.partial else qkv.target
    check_rope_kv_write(seen, positions, cos, sin, k_cache, v_cache, slots, heads, reals=_REALS, cache_types=TYPES)
    keys, values = Side.of(k_cache, "k_cache"), Side.of(v_cache, "v_cache")
    t = positions.shape[0]
    q = torch.empty(t, heads * d, dtype=seen.dtype, device=seen.device)
    if t:
        rope_kv_write_kernel[(heads + 2 * kv_heads, t)](
            *operands_of(qkv),
            positions,
            cos,
            sin,
            keys.cache,
            keys.grid,
            values.cache,
            values.grid,
            slots,
            q,
            t,
            heads,
            kv_heads,
            block_size,
            cos.shape[1],
            d,
            K_WIDTH=keys.width,
            V_WIDTH=values.width,
            K_BITS=keys.bits,
            V_BITS=values.bits,
            **constants_of(qkv),
            BLOCK_D=block_columns(d, keys, values),
            num_warps=1,
        )
    return q


def embedding(ids: Tensor, w: TritonQWeight) -> Tensor:
    """ids [T] int64 -> [T, K] float32; a row of NaN for an id outside [0, V)."""
    Dims("embedding").check("ids", ids, "T", (torch.int64,))
    y = torch.empty(ids.shape[0], w.k, dtype=torch.float32, device=w.codes.device)
    if y.numel():
        zero_base, zero_step = w.format.zero_line
        embedding_kernel[(triton.cdiv(w.k, BLOCK), ids.shape[0])](
            ids,
            w.codes,
            w.scales,
            w.zeros,
            y,
            w.n,
            w.padded_rows,
            w.k,
            w.geometry.units,
            w.geometry.columns if w.format.group_size == PER_CHANNEL else w.format.group_size,
            BITS=w.format.bits,
            ZERO_BASE=zero_base,
            ZERO_STEP=zero_step,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return y


def argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores [R, V] float32 -> (ids [R] int64, peaks [R] float32); NaN is the highest of all."""
    Dims("argmax").check("scores", scores, "R V", (torch.float32,))
    r, v = scores.shape
    if v == 0:
        raise ContractError("argmax: rows without a score")
    ids = torch.empty(r, dtype=torch.int64, device=scores.device)
    peaks = torch.empty(r, dtype=torch.float32, device=scores.device)
    if r:
        blocks = triton.cdiv(v, ARGMAX_BLOCK)
        block_peaks = torch.empty(r, blocks, dtype=torch.float32, device=scores.device)
        block_places = torch.empty(r, blocks, dtype=torch.int32, device=scores.device)
        block_argmax_kernel[(blocks, r)](scores, block_peaks, block_places, v, blocks, BLOCK=ARGMAX_BLOCK, num_warps=4)
        row_argmax_kernel[(r,)](
            block_peaks, block_places, ids, peaks, blocks, BLOCK=max(2, triton.next_power_of_2(blocks)), num_warps=1
        )
    return ids, peaks
