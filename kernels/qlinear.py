"""y = x · dequantize(w)ᵀ + bias: the product that dominates a low-bit model.

    x     [M, K]  float32 | bfloat16 | float16, rows contiguous
    w     QTensor [N, K] (formats.py), in the layout that the backend's `pack` made of it
    bias  [N] float32, or None
    y     [M, N]  dtype of x; sums in float32

M is the number of tokens in the step. Small M is bound by reading w once (GB/s), large M by arithmetic. A row of y
depends on the same row of x only, bit for bit, whatever M is: that is what makes a request's tokens independent of
the requests it shares a step with.

A backend is a pair: `pack(QTensor) -> weight in its own layout`, run once at load, and `qlinear(x, weight, bias)`.
"""

from __future__ import annotations

from torch import Tensor

from dibit.kernels.formats import QTensor, dequantize


def pack(w: QTensor) -> QTensor:
    """The reference computes on the QTensor itself."""
    return w


def qlinear_reference(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ dequantize(w).T
    return (y if bias is None else y + bias.float()).to(x.dtype)
