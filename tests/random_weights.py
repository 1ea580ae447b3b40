"""Weights whose codes, zero points and scales are random, each over its whole range."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.kernels.formats import Format, QTensor


def random_weight(n: int, k: int, format: Format, *, scales: Tensor | None = None) -> QTensor:
    """A weight [n, k]; scales [n, groups], or float16 numbers from 0.01 to 1.01."""
    groups = format.groups(k)
    return QTensor(
        codes=torch.randint(0, format.qmax + 1, (n, k), dtype=torch.uint8),
        zeros=torch.randint(0, format.qmax + 1, (n, groups), dtype=torch.uint8),
        scales=torch.rand(n, groups).add(0.01).half() if scales is None else scales,
        format=format,
    )
