"""The highest score of each row.

scores  [R, V] float32
ids     [R] int64     the first place of the highest score; NaN counts as the highest of all
peaks   [R] float32   the score there
"""

from __future__ import annotations

import torch
from torch import Tensor


def argmax_reference(scores: Tensor) -> tuple[Tensor, Tensor]:
    peaks, ids = torch.max(scores, dim=-1)
    return ids, peaks
