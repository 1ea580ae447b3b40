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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dibit.kernels.formats import Format, round_scales, zero_fields, zero_points

# Weights that are worked on at a time.
PIECE_ELEMENTS = 1 << 15


def fake_quantize(w: Tensor, scales: Tensor, zeros: Tensor, format: Format, *, settled: Tensor | None = None) -> Tensor:
    """w [N, K] as `format` gives it back under `scales` and zero points `zeros` [N, K/G] float: float32 [N, K].

    Scales are rounded as a checkpoint stores them, zero points to the nearest value of the format's grid; gradients
    pass both unchanged. The codes of weights that are `settled`, bool [N, K], are taken for constants, as those of
    weights that are cut off are.
    """
    found: Tensor = _FakeQuantize.apply(w, scales, zeros, format, settled)  # type: ignore[no-untyped-call]
    return found


def straight(x: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `x` unchanged."""
    found: Tensor = _Straight.apply(x, value)  # type: ignore[no-untyped-call]
    return found


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scales: Tensor, zeros: Tensor, format: Format, settled: Tensor | None) -> Tensor:
        s = round_scales(scales)[..., None]
        fractional = format.zero_grid == "fractional"
        if fractional:
            z = zero_points(zero_fields(zeros, format), format)[..., None]
        else:
            z = torch.round(zeros).clamp_(0, format.qmax)[..., None]
        grouped = w.view(*scales.shape, -1)
        fixed = None if settled is None else settled.view(grouped.shape)
        out, slope = torch.empty_like(grouped), torch.empty_like(grouped)
        inside = torch.empty(grouped.shape, dtype=torch.bool, device=w.device)
        for rows in _pieces(grouped):
            ratio = grouped[rows] / s[rows]
            wanted = torch.add(ratio, z[rows]).round_() if fractional else torch.round(ratio).add_(z[rows])
            levels = wanted.clamp(0, format.qmax)
            torch.eq(levels, wanted, out=inside[rows])
            if fixed is not None:
                inside[rows].logical_and_(fixed[rows].logical_not())
            levels.sub_(z[rows])
            torch.mul(levels, s[rows], out=out[rows])
            torch.sub(levels, ratio.mul_(inside[rows]), out=slope[rows])
        ctx.save_for_backward(slope, inside, s)
        return out.view(w.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, inside, s = ctx.saved_tensors
        grad = grads[0].reshape(slope.shape)
        passed = torch.empty_like(slope)
        to_scales, to_zeros = torch.empty_like(s[..., 0]), torch.empty_like(s[..., 0])
        for rows in _pieces(slope):
            torch.mul(grad[rows], inside[rows], out=passed[rows])
            torch.linalg.vecdot(grad[rows], slope[rows], out=to_scales[rows])
            torch.sub(passed[rows].sum(dim=-1), grad[rows].sum(dim=-1), out=to_zeros[rows])
        found = (passed.view(grads[0].shape), to_scales, to_zeros.mul_(s[..., 0]))
        return *(own if needed else None for own, needed in zip(found, ctx.needs_input_grad, strict=False)), None, None


def _pieces(grouped: Tensor) -> Iterator[slice]:
    """Rows whose intermediate values stay in the caches: twice as fast as whole passes over a large weight."""
    step = max(1, PIECE_ELEMENTS // max(1, grouped[0].numel()))
    return (slice(start, start + step) for start in range(0, grouped.shape[0], step))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
