"""RMS normalization (Zhang & Sennrich 2019), alone and fused with the residual sum before it.

    x         [T, K] float
    residual  [T, K] dtype of x
    weight    [K] float
    y         [T, K] dtype of x; the mean of squares in float32

`add_rms_norm` returns (norm(x + residual), x + residual). A fast backend may overwrite `residual` with the sum: use
the returned tensor only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps), total
