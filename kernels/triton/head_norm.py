"""Norms of query and key heads in Triton (device/head_norm.py). Contract in kernels/norm.py; `qkv` is overwritten."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dibit.kernels.norm import check_head_norm
from dibit.kernels.triton.device.head_norm import head_norm_kernel

_REALS = (torch.float32, torch.float16, torch.bfloat16)


def head_norm(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, heads: int, eps: float) -> Tensor:
    """`qkv` [T, (H + 2 KH) D] with its first H heads and the KH after them normalized. Raises ContractError."""
    kv_heads = check_head_norm(qkv, q_norm, k_norm, heads, reals=_REALS)
    t, width = qkv.shape
    d = q_norm.shape[0]
    if t:
        block = triton.next_power_of_2(d)
        grid = (heads + kv_heads, t)
        head_norm_kernel[grid](qkv, q_norm, k_norm, eps, width, heads, d, BLOCK_D=block, num_warps=1)
    return qkv
