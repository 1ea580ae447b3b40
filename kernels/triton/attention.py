"""Paged attention on NVIDIA GPUs (device/attention.py). Contract in kernels/attention.py.

Queries, and weights before they meet the values, are rounded to the cache's type, where that is codes to float16, as is
what the codes stand for; sums are float32. Against the reference on the same cache that is, for a float16 cache, an
error of at most about 2^-10 * max|v| for each unit of |scores| that a rounded query moves. Lengths and block numbers
are trusted: looking at them would stop the queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from dibit.kernels.attention import check_paged_attention
from dibit.kernels.kv import head_dim
from dibit.kernels.triton.cache import TYPES, Side, block_columns
from dibit.kernels.triton.device.attention import attention_kernel, merge_kernel
from dibit.kernels.triton.limits import SIDE_BY_SIDE_TOKENS, SPLIT_KEYS

BLOCK_KEYS = 32
STAGES = 2
_REALS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rows:
    """A program's share of the queries: `tokens` of a sequence times `heads` (of one KV head, padded)."""

    tokens: int
    heads: int
    warps: int


def blocks(group: int, longest: int, *, codes: bool = False) -> Rows:
    """16 rows of a matrix instruction while chunks are short, else 64, on twice the warps: 64 rows of 128 columns on
    four spill, as they do on eight beside the unpacking of `codes`, which have 32."""
    heads = triton.next_power_of_2(group)
    wide = longest > 16
    return Rows(max(1, (32 if codes else 64) // heads if wide else 16 // heads), heads, 8 if wide else 4)


@dataclass(frozen=True)
class Attended:
    """The result of attention for `tokens` tokens: target [T, H D], or when `partial` the `splits` of the keys apart,
    target [T, H, splits, D] float32 and the log2 of each one's sum of weights, weights [T, H, splits]."""

    target: Tensor
    weights: Tensor
    tokens: int
    splits: int
    head_dim: int
    partial: bool

    def rows(self, index: Tensor) -> Attended:
        """Of the tokens `index` [R] alone."""
        return replace(self, target=self.target[index], weights=self.weights[index], tokens=index.shape[0])


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
    split_keys: int = SPLIT_KEYS,
) -> Tensor:
    """Causal attention, [T, H D] in the dtype of q, in `out` when given.

    The rows of `block_tables` may be part of a wider table. Raises ContractError for shapes and dtypes.
    """
    out = torch.empty_like(q) if out is None else out
    attended = attend(q, k_cache, v_cache, cu_seqlens, seq_lens, block_tables, scale, out=out, split_keys=split_keys)
    return joined(attended, out=out).target


def joined(attended: Attended, *, out: Tensor | None = None) -> Attended:
    """The same with its splits joined, in `out` [T, H D] float where given, else in float32."""
    if not attended.partial:
        return attended
    tokens, heads, splits, d = attended.target.shape
    y = torch.empty(tokens, heads * d, dtype=torch.float32, device=attended.target.device) if out is None else out
    merge_kernel[(tokens * heads,)](
        attended.target, attended.weights, y, splits, d, BLOCK_D=max(16, triton.next_power_of_2(d)), num_warps=1
    )
    return replace(attended, target=y, weights=y, partial=False)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    split_keys: int = SPLIT_KEYS,
) -> Attended:
    """paged_attention, its splits perhaps not joined; `out` is used when they are."""
    check_paged_attention(q, k_cache, v_cache, cu_seqlens, seq_lens, block_tables, out, reals=_REALS, cache_types=TYPES)
    keys, values = Side.of(k_cache, "k_cache"), Side.of(v_cache, "v_cache")
    kv_heads, block_size, d = k_cache.shape[1], k_cache.shape[2], head_dim(k_cache)
    tokens, sequences = q.shape[0], seq_lens.shape[0]
    heads = q.shape[1] // d
    group = heads // kv_heads
    # Lengths live on the device: what bounds the grid is what is known here, the tokens and the width of the tables.
    splits = -(-block_tables.shape[1] * block_size // split_keys)
    partial = splits > 1 and 0 < tokens <= SIDE_BY_SIDE_TOKENS
    # A sequence's chunk is not known without a look at cu_seqlens, but with a token for every sequence all have one.
    longest = 1 if tokens == sequences else tokens - sequences + 1
    rows = blocks(group, longest, codes=min(keys.bits, values.bits) < 16)
    if partial:
        target = torch.empty(tokens, heads, splits, d, dtype=torch.float32, device=q.device)
        weights = torch.empty(tokens, heads, splits, dtype=torch.float32, device=q.device)
    else:
        target = weights = torch.empty_like(q) if out is None else out
    attended = Attended(target, weights, tokens, splits, d, partial)
    if tokens == 0:
        return attended
    attention_kernel[(triton.cdiv(longest, rows.tokens), sequences, kv_heads * (splits if partial else 1))](
        q,
        keys.cache,
        keys.grid,
        values.cache,
        values.grid,
        cu_seqlens,
        seq_lens,
        block_tables,
        target,
        weights,
        scale * math.log2(math.e),
        heads,
        kv_heads,
        group,
        block_tables.stride(0),
        block_size,
        splits,
        split_keys,
        d,
        K_WIDTH=keys.width,
        V_WIDTH=values.width,
        K_BITS=keys.bits,
        V_BITS=values.bits,
        PARTIAL=partial,
        BLOCK_D=block_columns(d, keys, values),
        BLOCK_Q=rows.tokens,
        BLOCK_G=rows.heads,
        BLOCK_N=BLOCK_KEYS,
        num_warps=rows.warps,
        num_stages=STAGES,
    )
    return attended
