"""Rotary embedding and the KV write in C++ (csrc/rope.cpp). Contract in rope.py.

Activations and tables are float32; the cache is of any type of kv.py, rounded to nearest even as torch rounds.
A position or a slot out of range is refused before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import ContractError
from dibit.kernels.kv import FP8, INT4, INT8, caches_fit, head_dim
from dibit.kernels.rope import check_rope_kv_write

CACHE_REALS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    INT8: 3,
    INT4: 4,
    FP8: 5,
}  # enum Real in csrc/vec_bodies.h

_F32, _I64 = torch.float32, torch.int64


@functools.cache
def _entry() -> Callable[..., int]:
    p, n = native.POINTER, native.INT
    return native.entry("dibit_rope_kv_write", *([p] * 8), *([n] * 10))


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, store k and v at `slots` (-1 stores nothing), return q [T, H D], in `out` when given.

    Raises ContractError for shapes and dtypes, NativeError for a position outside the tables or a slot outside the
    cache.
    """
    blocks, kv_heads, block_size, _ = k_cache.shape
    d = head_dim(k_cache)
    tokens, half = qkv.shape[0], cos.shape[1]
    fits = (
        qkv.dtype is _F32
        and qkv.is_contiguous()
        and qkv.shape == (tokens, (heads + 2 * kv_heads) * d)
        and positions.dtype is _I64
        and positions.is_contiguous()
        and slots.dtype is _I64
        and slots.is_contiguous()
        and positions.shape == slots.shape == (tokens,)
        and cos.dtype is _F32
        and sin.dtype is _F32
        and cos.is_contiguous()
        and sin.is_contiguous()
        and cos.shape == sin.shape
        and 2 * half <= d
        and caches_fit(k_cache, v_cache, d, types=CACHE_REALS)
        and qkv.is_cpu
        and positions.is_cpu
        and slots.is_cpu
        and cos.is_cpu
        and sin.is_cpu
    )
    if out is None:
        out = tape.empty(tokens, heads * d)
    elif out.dtype is not _F32 or not out.is_cpu or out.shape != (tokens, heads * d) or not out.is_contiguous():
        fits = False
    if not fits:
        _refuse(qkv, positions, cos, sin, k_cache, v_cache, slots, heads, out)
    status = _entry()(
        out.data_ptr(),
        qkv.data_ptr(),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots.data_ptr(),
        tokens,
        heads,
        kv_heads,
        d,
        half,
        cos.shape[0],
        blocks,
        block_size,
        CACHE_REALS[k_cache.dtype],
        CACHE_REALS[v_cache.dtype],
    )
    if status == 1:
        raise native.NativeError(
            f"rope_kv_write: positions {int(positions.min())} to {int(positions.max())}; "
            f"the tables cover 0 to {cos.shape[0] - 1}"
        )
    if status == 2:
        raise native.NativeError(
            f"rope_kv_write: slots {int(slots.min())} to {int(slots.max())}; "
            f"the cache has 0 to {blocks * block_size - 1}, and -1 writes nothing"
        )
    return out


def _refuse(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    out: Tensor,
) -> None:
    check_rope_kv_write(
        qkv, positions, cos, sin, k_cache, v_cache, slots, heads, out, reals=(_F32,), cache_types=frozenset(CACHE_REALS)
    )
    raise ContractError("rope_kv_write: every tensor must be on the CPU")
