"""What a quantization method may know about the inputs of a linear site, and how it is collected.

A method names its needs (`needs = frozenset({"hessian"})`); the pipeline collects exactly those from the hidden states
that the already quantized part of the model produces, one batch at a time, so that memory does not grow with the
amount of calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dibit.kernels.formats import Format, QTensor

Need = Literal["hessian", "float_stream", "inputs"]

# A Hessian this small costs nothing to sum in float64, and small models have the worst conditioned ones.
FLOAT64_BELOW_COLUMNS = 1024


class SiteFailure(Exception):
    """A method cannot quantize this site (the message says why); the pipeline rounds it to nearest and records it."""


@dataclass(frozen=True)
class Stats:
    """Statistics of the input of one site, over `tokens` rows x of the calibration text.

    hessian  [K, K], mean of x xᵀ, float64 below 1024 columns, else float32; None when the method did not ask
    """

    tokens: int = 0
    hessian: Tensor | None = None


class Method(Protocol):
    """Chooses the integers of one site. Its dataclass fields are its options."""

    needs: ClassVar[frozenset[Need]]

    @property
    def symmetric(self) -> bool: ...

    def quantize(self, w: Tensor, format: Format, stats: Stats) -> QTensor:
        """Quantize `w` float32 [N, K]; `w` is not changed. Raises SiteFailure."""
        ...


class HessianSum:
    """Running mean of x xᵀ."""

    def __init__(self, k: int) -> None:
        dtype = torch.float64 if k < FLOAT64_BELOW_COLUMNS else torch.float32
        self.mean = torch.zeros(k, k, dtype=dtype)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in the rows of `x` [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).to(self.mean.dtype)
        total = self.tokens + rows.shape[0]
        # A mean, not a sum: its size does not depend on the amount of text, so float32 keeps its digits.
        self.mean.addmm_(rows.T, rows, beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    def stats(self) -> Stats:
        return Stats(tokens=self.tokens, hessian=self.mean)


def output_error(delta: Tensor, w: Tensor, hessian: Tensor) -> float:
    """Relative squared error of the site's output, ‖delta xᵀ‖² / ‖w xᵀ‖² over the calibration rows.

    delta, w [N, K]; hessian [K, K]. NaN when the reference output is zero.
    """
    return _quadratic(delta, hessian) / reference if (reference := _quadratic(w, hessian)) > 0 else float("nan")


def _quadratic(a: Tensor, hessian: Tensor) -> float:
    a = a.to(hessian.dtype)
    return float(((a @ hessian) * a).sum(dtype=torch.float64))
