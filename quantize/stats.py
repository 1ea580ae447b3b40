"""What a quantization method may know about the inputs of a linear site, and how it is collected.

A method names its needs (`needs = frozenset({"hessian"})`); the pipeline collects exactly those from the hidden states
that the already quantized part of the model produces, one batch at a time, so that memory does not grow with the
amount of calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dibit.kernels.formats import Format, QTensor

Need = Literal["hessian", "cross", "float_stream", "inputs", "token_weights", "relative"]

# A Hessian this small costs nothing to sum in float64, and small models have the worst conditioned ones.
FLOAT64_BELOW_COLUMNS = 1024


class SiteFailure(Exception):
    """A method cannot quantize this site (the message says why); the pipeline rounds it to nearest and records it."""


@dataclass(frozen=True)
class Stats:
    """Statistics of the input of one site, over `tokens` rows x of the calibration text.

    hessian   [K, K], mean of x xᵀ, float64 below 1024 columns, else float32; None when the method did not ask
    cross     [K, K], mean of x yᵀ with y the input of the site in the float model; None when the method did not ask
    held_out  the same over other rows, for a method that asked for `cross`
    """

    tokens: int = 0
    hessian: Tensor | None = None
    cross: Tensor | None = None
    held_out: Stats | None = None

    def everything(self) -> Stats:
        """Over the held-out rows too."""
        other = self.held_out
        if other is None:
            return self
        tokens = self.tokens + other.tokens
        return Stats(tokens, _mixed(self, other, "hessian", tokens), _mixed(self, other, "cross", tokens))


def _mixed(a: Stats, b: Stats, name: str, tokens: int) -> Tensor | None:
    own, other = getattr(a, name), getattr(b, name)
    return None if own is None or other is None else own * (a.tokens / tokens) + other * (b.tokens / tokens)


class Method(Protocol):
    """Chooses the integers of one site. Its dataclass fields are its options."""

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def symmetric(self) -> bool: ...

    def quantize(self, w: Tensor, format: Format, stats: Stats) -> QTensor:
        """Quantize `w` float32 [N, K]; `w` is not changed. Raises SiteFailure."""
        ...


class HessianSum:
    """Running mean of x xᵀ, or of x yᵀ, of weighted rows."""

    def __init__(self, k: int) -> None:
        dtype = torch.float64 if k < FLOAT64_BELOW_COLUMNS else torch.float32
        self.mean = torch.zeros(k, k, dtype=dtype)
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None, *, weights: Tensor | None = None) -> None:
        """Take in the rows of `x` [..., K], or x yᵀ for those of `y` beside them, times `weights` [...] of the rows."""
        rows = x.reshape(-1, x.shape[-1]).to(self.mean.dtype)
        others = rows if y is None else y.reshape(-1, y.shape[-1]).to(self.mean.dtype)
        total = self.tokens + rows.shape[0]
        left = rows if weights is None else rows * weights.reshape(-1, 1)
        # A mean, not a sum: its size does not depend on the amount of text, so float32 keeps its digits.
        self.mean.addmm_(left.T, others, beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    def stats(self) -> Stats:
        return Stats(tokens=self.tokens, hessian=self.mean)


def output_error(deltas: Sequence[Tensor], weights: Sequence[Tensor], hessians: Sequence[Tensor]) -> float:
    """Relative squared error of the outputs, ‖delta xᵀ‖² / ‖w xᵀ‖² over the calibration rows, of linears together.

    deltas, weights [N, K] and hessians [K, K] of each. NaN when the reference output is zero.
    """
    reference = sum(map(_quadratic, weights, hessians))
    return sum(map(_quadratic, deltas, hessians)) / reference if reference > 0 else float("nan")


def _quadratic(a: Tensor, hessian: Tensor) -> float:
    a = a.to(hessian.dtype)
    return float(((a @ hessian) * a).sum(dtype=torch.float64))
