"""Paged attention in C++ (csrc/attention.cpp): float32 queries, a cache of any type of kv.py. Contract in
attention.py, its bitwise invariance included: threads, batch, chunks and block numbers leave no trace in a result.

Lengths and block numbers are checked before anything is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.attention import check_paged_attention
from dibit.kernels.contract import ContractError
from dibit.kernels.kv import caches_fit, head_dim
from dibit.kernels.rope_cpu import CACHE_REALS

_F32, _I32 = torch.float32, torch.int32


@functools.cache
def _entry() -> Callable[..., int]:
    p, n = native.POINTER, native.INT
    return native.entry("dibit_paged_attention", *([p] * 7), *([n] * 11), native.FLOAT)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention, [T, H D] float32, in `out` when given (`q` itself is not allowed).

    The rows of `block_tables` may be part of a wider table. Raises ContractError for shapes and dtypes, NativeError
    for lengths or block numbers that do not fit.
    """
    blocks, kv_heads, block_size, _ = k_cache.shape
    d = head_dim(k_cache)
    tokens, sequences = q.shape[0], seq_lens.shape[0]
    heads = q.shape[1] // d
    fits = (
        q.dtype is _F32
        and q.is_contiguous()
        and heads * d == q.shape[1]
        and heads % kv_heads == 0
        and caches_fit(k_cache, v_cache, d, types=CACHE_REALS)
        and cu_seqlens.dtype is _I32
        and seq_lens.dtype is _I32
        and block_tables.dtype is _I32
        and cu_seqlens.is_contiguous()
        and seq_lens.is_contiguous()
        and cu_seqlens.shape == (sequences + 1,)
        and block_tables.shape[0] == sequences
        and block_tables.stride(1) == 1
        and q.is_cpu
        and cu_seqlens.is_cpu
        and seq_lens.is_cpu
        and block_tables.is_cpu
    )
    if out is None:
        out = tape.empty(*q.shape)
    elif out.dtype is not _F32 or not out.is_cpu or out.shape != q.shape or not out.is_contiguous():
        fits = False
    if not fits:
        _refuse(q, k_cache, v_cache, cu_seqlens, seq_lens, block_tables, out)
    status = _entry()(
        out.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cu_seqlens.data_ptr(),
        seq_lens.data_ptr(),
        block_tables.data_ptr(),
        tokens,
        sequences,
        block_tables.stride(0),
        block_tables.shape[1],
        heads,
        kv_heads,
        d,
        blocks,
        block_size,
        CACHE_REALS[k_cache.dtype],
        CACHE_REALS[v_cache.dtype],
        scale,
    )
    if status:
        raise native.NativeError(f"paged_attention: {_reason(status, q, k_cache, cu_seqlens, seq_lens, block_tables)}")
    return out


def _reason(status: int, q: Tensor, k_cache: Tensor, cu_seqlens: Tensor, seq_lens: Tensor, block_tables: Tensor) -> str:
    if status == 1:
        return f"cu_seqlens {_some(cu_seqlens)} must rise from 0 to the {q.shape[0]} tokens of q"
    if status == 2:
        capacity = block_tables.shape[1] * k_cache.shape[2]
        return (
            f"seq_lens {_some(seq_lens)}; each must be at least its tokens in cu_seqlens {_some(cu_seqlens)} "
            f"and at most the {capacity} keys of its block table"
        )
    return f"a block table names a block outside the cache's 0 to {k_cache.shape[0] - 1}"


def _some(values: Tensor) -> str:
    head = ", ".join(str(v) for v in values[:8].tolist())
    return f"[{head}, ...]" if values.numel() > 8 else f"[{head}]"


def _refuse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    out: Tensor,
) -> None:
    check_paged_attention(
        q,
        k_cache,
        v_cache,
        cu_seqlens,
        seq_lens,
        block_tables,
        out,
        reals=(_F32,),
        cache_types=frozenset(CACHE_REALS),
    )
    raise ContractError("paged_attention: every tensor must be on the CPU")
