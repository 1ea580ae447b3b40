"""The scales and zero points of a group of weights that round it with the least weighted error.

For each group of a row, over s > 0 and z out of the values that the format's zero field can hold:

    minimise  sum_j h_j (s (q_j - z) - w_j)²     q_j = clamp(round(w_j / s + z), 0, 2^bits - 1)

At 2 bits the min-max grid costs two to three times the least error of a Gaussian group, so this is most of what a
method without training can gain. Candidates come from shrunk min-max ranges under every zero point (at 2 and 3 bits;
those next to the min-max one above), the best is then improved by turns: the codes held fixed, s and z solve a least
squares problem; both given, the weights are rounded again. Scales are float16 values throughout the last part, so the
error found is that of the stored weight. It is never above that of the min-max grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.kernels.formats import PER_CHANNEL, Format, round_scales, zero_points

# Shares of the min-max range that are tried: fewer bits want a smaller one.
SHARES = tuple(0.30 + 0.05 * i for i in range(16))
TURNS = 4
# Up to here every zero point is tried.
ALL_ZEROS_BITS = 3
# Weights searched at a time: the temporaries stay in a core's cache.
SLICE_ELEMENTS = 1 << 16
# A column whose input is nearly always zero keeps this share of the mean importance: other text may use it.
LEAST_IMPORTANCE = 1e-3


def search_grid(
    w: Tensor, format: Format, *, symmetric: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales float32 (float16 values) and zeros uint8, both [N, K/G], of `w` [N, K].

    importance  [K], h above, at least 0; None: all alike
    symmetric   zero points stay in the middle of the code range
    """
    n, k = w.shape
    width = format.columns_per_group(k)
    h = torch.ones(k) if importance is None else importance.float()
    mean = h.mean()
    h = (h / mean).clamp_min(LEAST_IMPORTANCE) if float(mean) > 0 else torch.ones(k)
    grouped, h = w.float().reshape(n, -1, width), h.view(-1, width)
    rows = max(1, SLICE_ELEMENTS // k)
    found = [_Search(grouped[i : i + rows], h, format, symmetric=symmetric).run() for i in range(0, n, rows)]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


class _Search:
    """The best grid so far, of each group of w [N, K/G, G] under h [K/G, G]."""

    def __init__(self, w: Tensor, h: Tensor, format: Format, *, symmetric: bool) -> None:
        self._w, self._h, self._format, self._symmetric = w, h, format, symmetric
        self._values = zero_points(torch.arange(format.qmax + 1, dtype=torch.uint8), format)
        single = Format(format.bits, PER_CHANNEL, zero_grid=format.zero_grid)
        scales, zeros = single.ranges(w.flatten(0, 1), symmetric=symmetric)
        self._scales, self._zeros = scales.view(w.shape[:2]), zeros.view(w.shape[:2]).long()
        self._least = self._error(self._scales, self._zeros)
        self._first = self._scales, self._zeros, self._least

    def run(self) -> tuple[Tensor, Tensor]:
        whole, middle = self._scales, self._zeros
        for share in SHARES:
            scales = whole * share
            for zeros in self._candidates(middle):
                self._keep(scales, zeros, self._error(scales, zeros))
        for _ in range(TURNS):
            scales, zeros = self._solved()
            self._keep(scales, zeros, self._error(scales, zeros))
        self._keep(*self._first)
        return self._scales, self._zeros.to(torch.uint8)

    def _candidates(self, middle: Tensor) -> list[Tensor]:
        if self._symmetric:
            return [middle]
        if self._format.bits <= ALL_ZEROS_BITS:
            return [torch.full_like(middle, code) for code in range(self._format.qmax + 1)]
        return [(middle + step).clamp(0, self._format.qmax) for step in (-1, 0, 1)]

    def _keep(self, scales: Tensor, zeros: Tensor, error: Tensor) -> None:
        """Where they are better."""
        better = error < self._least
        self._least = torch.where(better, error, self._least)
        self._scales = torch.where(better, scales, self._scales)
        self._zeros = torch.where(better, zeros, self._zeros)

    def _error(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """[N, K/G]; in place, as this is where the time goes."""
        z = self._values[zeros][..., None]
        exact = torch.addcmul(z, self._w, (1 / scales)[..., None])
        codes = torch.round(exact).clamp_(0, self._format.qmax)
        return codes.sub_(exact).square_().mul_(self._h).sum(dim=-1).mul_(scales).mul_(scales)

    def _solved(self) -> tuple[Tensor, Tensor]:
        """Least squares for the codes of the best grid, z brought to the nearest value that can be stored."""
        w, h = self._w, self._h
        scales, zeros = round_scales(self._scales), self._zeros
        # From here on the error is that of a scale that can be stored.
        self._scales, self._least = scales, self._error(scales, zeros)
        codes = torch.addcmul(self._values[zeros][..., None], w, (1 / scales)[..., None])
        codes = codes.round_().clamp_(0, self._format.qmax)
        weighted = codes * h
        total, first, second = h.sum(-1), weighted.sum(-1), (weighted * codes).sum(-1)
        plain, mixed = (w * h).sum(-1), (w * weighted).sum(-1)
        if not self._symmetric:
            slope = (total * mixed - first * plain) / (total * second - first * first)
            exact = (first - plain / slope) / total
            usable = slope.isfinite() & (slope > 0) & exact.isfinite()
            nearest = (exact.clamp(self._values[0], self._values[-1])[..., None] - self._values).abs().argmin(-1)
            zeros = torch.where(usable, nearest, zeros)
        z = self._values[zeros]
        slope = (mixed - z * plain) / (second - 2 * z * first + z * z * total)
        usable = slope.isfinite() & (slope > 0)
        return torch.where(usable, round_scales(torch.where(usable, slope, 1.0)), scales), zeros
