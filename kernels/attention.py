"""Causal attention of a step's tokens over a paged KV cache: decode, prefill and chunked prefill are one op.

    q             [T, H D]  rotated queries of all sequences, one after another
    k_cache       [blocks, KH, block_size, W] rows as in kv.py (v_cache alike); H a multiple of KH
    cu_seqlens    [B + 1] int32   first token of each sequence in q; cu_seqlens[B] = T
    seq_lens      [B] int32       keys of each sequence, this step's tokens included
    block_tables  [B, max_blocks] int32   block of the sequence's keys i * block_size ...; entries past the end unread
    scale         float           multiplies q · k
    out           [T, H D]        dtype of q; softmax and sums in float32

Token i of sequence b sits at position seq_lens[b] - (cu_seqlens[b + 1] - cu_seqlens[b]) + i and sees keys up to its own
position. The result for a token depends on that token and its keys only, bit for bit, whatever else is in the step
and however its prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dibit.kernels.contract import ContractError, Dims
from dibit.kernels.kv import check_cache, head_dim, load_rows


def check_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    out: Tensor | None,
    *,
    reals: Iterable[torch.dtype],
    cache_types: frozenset[torch.dtype],
) -> None:
    """Raises ContractError for shapes, dtypes other than `reals` of q and `cache_types` of the cache, and strides."""
    dims = Dims("paged_attention")
    dims.check("q", q, "T W", reals)
    d = head_dim(k_cache)
    check_cache(dims, k_cache, v_cache, d, types=cache_types)
    dims.check("seq_lens", seq_lens, "B", (torch.int32,))
    dims.check("block_tables", block_tables, "B max_blocks", (torch.int32,), contiguous=False)
    Dims("paged_attention", **{"B+1": seq_lens.shape[0] + 1}).check("cu_seqlens", cu_seqlens, "B+1", (torch.int32,))
    if out is not None:
        dims.check("out", out, "T W", (q.dtype,))
    width, kv_heads = q.shape[1], k_cache.shape[1]
    if width % d or width // d % kv_heads:
        raise ContractError(f"paged_attention: q has {width} columns; expected a multiple of KH * D = {kv_heads} * {d}")
    if block_tables.stride(1) != 1:
        raise ContractError(f"paged_attention: block_tables has strides {block_tables.stride()}; expected rows as runs")


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    d, block_size = head_dim(k_cache), k_cache.shape[2]
    heads = q.shape[1] // d
    out = torch.empty_like(q)
    for b in range(seq_lens.shape[0]):
        start, stop, length = int(cu_seqlens[b]), int(cu_seqlens[b + 1]), int(seq_lens[b])
        table = block_tables[b, : -(-length // block_size)].long()
        keys, values = (
            load_rows(cache[table].transpose(0, 1).flatten(1, 2)[:, :length], d) for cache in (k_cache, v_cache)
        )
        queries = q[start:stop].view(stop - start, heads, d).transpose(0, 1)
        attended = causal_attention(queries, keys, values, scale)
        out[start:stop] = attended.transpose(0, 1).reshape(stop - start, heads * d)
    return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Dense attention of the last Q positions: q [H, Q, D] over k, v [KH, L, D], L >= Q -> [H, Q, D]."""
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, dim=0), v.repeat_interleave(repeat, dim=0)
    scores = (q.float() @ k.float().transpose(1, 2)) * scale
    queries, length = scores.shape[1], scores.shape[2]
    visible = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ v.float()).to(q.dtype)
