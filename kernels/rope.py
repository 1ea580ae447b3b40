"""Rotary position embedding (Su et al. 2021), and its fusion with the write into the paged KV cache.

    qkv        [T, (H + 2 KH) D]  query heads, then key heads, then value heads
    positions  [T] int64          position of each token in its sequence
    cos, sin   [P, D/2] float32   tables over positions (models/spec.py makes them from the rope scaling)
    k_cache    [blocks, KH, block_size, W]   (v_cache alike) rows as in kv.py, of one type each
    slots      [T] int64          block * block_size + offset; -1 writes nothing (padding)
    q          [T, H D] dtype of qkv

Halves layout, as in transformers: element j is rotated with element j + D/2. `cos` and `sin` may cover fewer than D
dimensions (partial rotary): columns beyond 2 * cos.shape[1] pass through unrotated.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dibit.kernels.contract import ContractError, Dims
from dibit.kernels.kv import check_cache, head_dim, store_rows


def check_rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
    out: Tensor | None = None,
    *,
    reals: Iterable[torch.dtype],
    cache_types: frozenset[torch.dtype],
) -> None:
    """Raises ContractError for shapes, strides, and dtypes other than `reals` of qkv and `cache_types` of the cache."""
    d = head_dim(k_cache)
    dims = Dims("rope_kv_write", W=(heads + 2 * k_cache.shape[1]) * d, O=heads * d)
    dims.check("qkv", qkv, "T W", reals)
    dims.check("positions", positions, "T", (torch.int64,))
    dims.check("slots", slots, "T", (torch.int64,))
    dims.check("cos", cos, "P R/2", (torch.float32,))
    dims.check("sin", sin, "P R/2", (torch.float32,))
    check_cache(dims, k_cache, v_cache, d, types=cache_types)
    if out is not None:
        dims.check("out", out, "T O", (qkv.dtype,))
    if 2 * cos.shape[1] > d:
        raise ContractError(f"rope_kv_write: the tables rotate {2 * cos.shape[1]} of {d} dimensions")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [T, H, D] by cos/sin [T, R/2], R <= D."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    c, s = cos[:, None, :], sin[:, None, :]
    rotated = torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [T, H, D], k [T, KH, D], v [T, KH, D] of a fused projection."""
    t, width = qkv.shape
    d = width // (heads + 2 * kv_heads)
    shaped = qkv.view(t, heads + 2 * kv_heads, d)
    return shaped[:, :heads], shaped[:, heads : heads + kv_heads], shaped[:, heads + kv_heads :]


def rope_kv_write_reference(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
) -> Tensor:
    """Rotate q and k, store k and v at `slots`, return q [T, H D]."""
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    q, k, v = split_heads(qkv, heads, kv_heads)
    c, s = cos[positions], sin[positions]
    q, k = rotate(q, c, s), rotate(k, c, s)
    kept = slots >= 0
    block, offset = slots[kept] // block_size, slots[kept] % block_size
    k_cache[block, :, offset] = store_rows(k[kept], k_cache.dtype)
    v_cache[block, :, offset] = store_rows(v[kept], v_cache.dtype)
    return q.flatten(1)
