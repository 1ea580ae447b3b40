"""Quantizing and dequantizing a weight in one differentiable step.

The value is exactly that of `dequantize(format.encode(w, scales, zeros))` with scales rounded to their type on disk,
so what is trained is what is written. With q = round(w / s + z), cut off to [0, qmax], and out = (q - z) s, the
gradient takes rounding for the identity (straight-through) and the cutting for what it is, on either zero grid:

    inside the range    ∂out/∂w = 1    ∂out/∂s = (q - z) - w / s    ∂out/∂z = 0
    cut off             ∂out/∂w = 0    ∂out/∂s = q - z              ∂out/∂z = -s

Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+", 2020, for z. The backward pass keeps
one float and one byte per weight, nothing else of the weight's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit.kernels.formats import Format, round_scales, zero_fields, zero_points


def fake_quantize(w: Tensor, scales: Tensor, zeros: Tensor, format: Format) -> Tensor:
    """w [N, K] as `format` gives it back under `scales` and zero points `zeros` [N, K/G] float: float32 [N, K].

    Scales are rounded as a checkpoint stores them, zero points to the nearest value of the format's grid; gradients
    pass both unchanged.
    """
    found: Tensor = _FakeQuantize.apply(w, scales, zeros, format)  # type: ignore[no-untyped-call]
    return found


def straight(x: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `x` unchanged."""
    found: Tensor = _Straight.apply(x, value)  # type: ignore[no-untyped-call]
    return found


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scales: Tensor, zeros: Tensor, format: Format) -> Tensor:
        s = round_scales(scales)[..., None]
        ratio = w.view(*scales.shape, -1) / s
        if format.zero_grid == "fractional":
            z = zero_points(zero_fields(zeros, format), format)[..., None]
            wanted = torch.add(ratio, z).round_()
        else:
            z = torch.round(zeros).clamp_(0, format.qmax)[..., None]
            wanted = torch.round(ratio).add_(z)
        levels = wanted.clamp(0, format.qmax)
        inside = levels == wanted
        levels.sub_(z)
        out = torch.mul(levels, s, out=wanted).view(w.shape)
        ctx.save_for_backward(levels.sub_(ratio.mul_(inside)), inside, s)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, inside, s = ctx.saved_tensors
        grad = grads[0].reshape(slope.shape)
        passed = grad * inside
        to_scales = (grad * slope).sum(dim=-1) if ctx.needs_input_grad[1] else None
        to_zeros = (passed.sum(dim=-1) - grad.sum(dim=-1)) * s[..., 0] if ctx.needs_input_grad[2] else None
        return (passed.view(grads[0].shape) if ctx.needs_input_grad[0] else None), to_scales, to_zeros, None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
