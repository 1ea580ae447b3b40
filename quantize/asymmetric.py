"""Rounding towards the float model's output although the inputs are those of the quantized one.

A linear that reads x̃, what the quantized blocks before it pass on, should give what the float one makes of the float
model's input x. Among float weights, with H = mean of x̃ x̃ᵀ and G = mean of x̃ xᵀ, the best one is

    W* = W + D     D = W (Gᵀ - H) H⁻¹     since then E ‖W x - W* x̃‖² is least

and as ‖W x - Ŵ x̃‖² = ‖(W* - Ŵ) x̃‖² + a constant, rounding W* instead of W by any method that minimises the latter makes
up for errors made before (Zhang et al., "QEP", NeurIPS 2025; Li et al., "GPTAQ", ICML 2025; "Qronos", ICLR 2026). D
fits the text it is solved on, so only a share a of it is taken, the one that is best on text that D has not seen:
E ‖W x - (W + a D) x̃‖² is a parabola in a.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dibit.quantize.stats import SiteFailure, Stats

logger = logging.getLogger(__name__)

# Share of the mean diagonal added to H. More than rounding needs: D is a regression, not a distance.
DAMP = 0.02


def corrected(w: Tensor, stats: Stats) -> tuple[Tensor, float]:
    """W + a D float32 [N, K] for `w` [N, K], and a in [0, 1].

    stats  with `cross`, and `held_out` that has it too
    """
    if stats.hessian is None or stats.cross is None or stats.held_out is None:
        raise SiteFailure("no statistics of both streams were collected")
    seen = stats.held_out
    if seen.hessian is None or seen.cross is None:
        raise SiteFailure("no held-out statistics of both streams were collected")
    share = _share(w, _correction(w, stats.hessian, stats.cross), seen.hessian, seen.cross)
    # The share is settled; the correction itself may then learn from all of the text.
    whole = stats.everything()
    assert whole.hessian is not None
    assert whole.cross is not None
    return (w + share * _correction(w, whole.hessian, whole.cross)).float(), share


def _correction(w: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """D [N, K], solved with damping, which draws it to zero."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMP * float(hessian.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise SiteFailure("the statistics of both streams cannot be solved for a correction")
    # (H + λ) Dᵀ = (G - H) Wᵀ, H being symmetric.
    solved: Tensor = torch.cholesky_solve((cross - hessian) @ w.T.to(hessian.dtype), factor)
    return solved.T


def _share(w: Tensor, d: Tensor, hessian: Tensor, cross: Tensor) -> float:
    """Where E ‖W x - (W + a D) x̃‖² is least."""
    slope = float(((d @ (cross - hessian)) * w).sum(dtype=torch.float64))
    curvature = float(((d @ hessian) * d).sum(dtype=torch.float64))
    if not curvature > 0:
        return 0.0
    return min(max(slope / curvature, 0.0), 1.0)
