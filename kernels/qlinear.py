"""y = x · dequantize(w)ᵀ + bias: the product that dominates a low-bit model.

    x     [M, K]  float32 | bfloat16 | float16, rows contiguous
    w     QTensor [N, K] (formats.py), in the layout that the backend's `pack` made of it
    bias  [N] float32, or None
    y     [M, N]  dtype of x; sums in float32

M is the number of tokens in the step. Small M is bound by reading w once (GB/s), large M by arithmetic. A row of y
depends on the same row of x only, bit for bit, whatever M is: that is what makes a request's tokens independent of
the requests it shares a step with.

With `activation_bits` (4, 6 or 8) x is rounded first, a token at a time (`quantize_activations`), and what is
multiplied are integers: that is the arithmetic which a model quantized to W4A4, W6A6 or W4A8 was made for. Without it
x stands for itself, and how near a backend comes to that is the backend's to say.

A backend is a pair: `pack(QTensor) -> weight in its own layout`, run once at load, and `qlinear(x, weight, bias)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.kernels.formats import FormatError, QTensor, dequantize

ACTIVATION_BITS = (4, 6, 8)


def check_activation_bits(bits: int) -> int:
    """Raises FormatError for a width that is not in ACTIVATION_BITS."""
    if bits not in ACTIVATION_BITS:
        raise FormatError(f"activations of {bits} bits; supported: {', '.join(map(str, ACTIVATION_BITS))}")
    return bits


def quantize_activations(x: Tensor, *, bits: int) -> Tensor:
    """x [.., K] as symmetric integers of `bits` bits give it back, in x's dtype.

    Per token (a row of the last axis): scale = max|x| / qmax in float32 with qmax = 2^(bits-1) - 1, codes =
    round(x / scale) with ties to even in [-qmax, qmax], result codes * scale. A row of zeros stays zero; one with a
    NaN or an infinity becomes NaN throughout. Its gradient is that of `torch.round`, zero.
    """
    qmax = (1 << (check_activation_bits(bits) - 1)) - 1
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest.isfinite(), largest / qmax, torch.nan)
    codes = torch.round(wide / torch.where(scales == 0, 1.0, scales)).clamp_(-qmax, qmax)
    return (codes * scales).to(x.dtype)


def pack(w: QTensor) -> QTensor:
    """The reference computes on the QTensor itself."""
    return w


def qlinear_reference(
    x: Tensor, w: QTensor, bias: Tensor | None = None, *, activation_bits: int | None = None
) -> Tensor:
    wide = x.float()
    if activation_bits is not None:
        wide = quantize_activations(wide, bits=activation_bits)
    y = wide @ dequantize(w).T
    return (y if bias is None else y + bias.float()).to(x.dtype)
