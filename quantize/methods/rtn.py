"""Round to nearest: every group's range from its own weights, every weight to the nearest code.

Needs no calibration text and no forward pass; the baseline that every other method must beat. The one knob that
matters is the group size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dibit.kernels.formats import PER_CHANNEL, Format, QTensor, dequantize
from dibit.quantize.grid import search_grid
from dibit.quantize.stats import Need, Stats

# The grid and the norm of GPTQ's released quantizer: the range shrinks from 100 % to 21 %. An exponent above 2 keeps
# the large weights, which the search would otherwise clip, in sight.
SHRINK_STEPS = 80
SHRINK_DENOMINATOR = 100
ERROR_POWER = 2.4
# Rows searched at a time: bounds the temporaries of the search.
SEARCH_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    symmetric     zero points in the middle of the code range
    range_search  shrink each group's range to the least weight error instead of covering every weight; fractional zero
                  points are always searched for, as those that cover every weight gain nothing
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    symmetric: bool = False
    range_search: bool = False

    def quantize(self, w: Tensor, format: Format, stats: Stats) -> QTensor:
        scales, zeros = choose_ranges(w, format, symmetric=self.symmetric, search=self.range_search)
        return format.encode(w, scales, zeros)


def choose_ranges(w: Tensor, format: Format, *, symmetric: bool, search: bool) -> tuple[Tensor, Tensor]:
    """Scales float32 and zeros uint8 [N, K/G] of `w` [N, K]: min-max, or with `search` the range of least error.

    On the fractional zero grid always those of least squared error.
    """
    if format.zero_grid == "fractional":
        return search_grid(w, format, symmetric=symmetric)
    if not search:
        return format.ranges(w, symmetric=symmetric)
    n, k = w.shape
    width = format.columns_per_group(k)
    # Rows of one group each: the format of a single group does not depend on how many stand in a row.
    rows = w.float().reshape(-1, width)
    single = Format(bits=format.bits, group_size=PER_CHANNEL, zero_grid=format.zero_grid)
    step = max(1, SEARCH_ELEMENTS // width)
    found = [_search(rows[i : i + step], single, symmetric=symmetric) for i in range(0, rows.shape[0], step)]
    scales = torch.cat([s for s, _ in found]).reshape(n, -1)
    zeros = torch.cat([z for _, z in found]).reshape(n, -1)
    return scales, zeros


def _search(rows: Tensor, format: Format, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    scales, zeros = format.ranges(rows, symmetric=symmetric)
    least = _error(rows, format, scales, zeros)
    for i in range(1, SHRINK_STEPS):
        tried_scales, tried_zeros = format.ranges(rows * (1 - i / SHRINK_DENOMINATOR), symmetric=symmetric)
        error = _error(rows, format, tried_scales, tried_zeros)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better[:, None], tried_scales, scales)
        zeros = torch.where(better[:, None], tried_zeros, zeros)
    return scales, zeros


def _error(rows: Tensor, format: Format, scales: Tensor, zeros: Tensor) -> Tensor:
    return (dequantize(format.encode(rows, scales, zeros)) - rows).abs_().pow_(ERROR_POWER).sum(dim=1)
