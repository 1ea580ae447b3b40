"""Columns side by side: the outputs of linears that read the same input, as one.

parts  [T, N_i] float, one dtype
y      [T, sum of N_i]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def concat_reference(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=-1)
