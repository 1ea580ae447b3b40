"""RMS normalization (Zhang & Sennrich 2019): alone, fused with the residual sum before it, and of single heads.

    x         [T, K] float
    residual  [T, K] dtype of x
    weight    [K] float
    y         [T, K] dtype of x; the mean of squares in float32

`add_rms_norm` returns (norm(x + residual), x + residual). A fast backend may overwrite `residual` with the sum: use the
returned tensor only.

`head_norm` normalizes the heads of queries and keys, each over its own D columns:

    qkv     [T, (H + 2 KH) D]  query heads, then key heads, then value heads, which stay
    q_norm  [D], k_norm [D]
    heads   H

It returns the same shape; a fast backend may overwrite `qkv`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dibit.kernels.contract import ContractError, Dims


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def check_head_norm(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, heads: int, *, reals: Iterable[torch.dtype]) -> int:
    """How many heads keys have. Raises ContractError for shapes, strides and dtypes other than `reals` of qkv."""
    dims = Dims("head_norm")
    dims.check("qkv", qkv, "T W", reals)
    dims.check("q_norm", q_norm, "D", (torch.float32,))
    dims.check("k_norm", k_norm, "D", (torch.float32,))
    width, d = qkv.shape[1], q_norm.shape[0]
    left = width - heads * d
    if left < 2 * d or left % (2 * d):
        raise ContractError(f"head_norm: qkv has {width} columns; expected ({heads} + 2 KH) * {d}")
    return left // (2 * d)


def head_norm_reference(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, heads: int, eps: float) -> Tensor:
    d = q_norm.shape[0]
    shaped = qkv.view(qkv.shape[0], qkv.shape[1] // d, d)
    kv_heads = (shaped.shape[1] - heads) // 2
    q, k, v = torch.split(shaped, [heads, kv_heads, kv_heads], dim=1)
    normed = [rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps), v]
    return torch.cat(normed, dim=1).flatten(1)
