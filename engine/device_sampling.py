"""Tokens drawn where the logits lie: only ids travel.

The definition is that of draw.py: temperature, min_p, top_k, top_p, and one uniform number through the inverse of the
cumulative distribution, in the order of ids. The Triton kernels do it where they run (kernels/triton/sampling.py), else
torch's own ops. With these exp is torch's, sums are taken in another order, and of tokens with different scores and the
same weight top_p takes those with the higher score first. So a number near the border of two tokens may give the other
one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dibit.kernels.triton import availability
from dibit.kernels.triton.limits import MAX_DRAWN_COLUMNS

# Sorted values, their ids and sums in float64 are nine times the logits' size.
SLICE_BYTES = 16 << 20


def draw(
    scores: Tensor,
    *,
    temperature: Sequence[float],
    min_p: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    numbers: Sequence[float],
) -> Tensor:
    """Ids [R] int64 of scores [R, V] float32, each row drawn with its number in [0, 1). Temperatures are above 0; top_k
    0 or less, min_p 0 and top_p 1 filter nothing. A row whose highest score is not finite gets any id."""
    any_k, any_p = any(k > 0 for k in top_k), any(p < 1.0 for p in top_p)
    settings = torch.tensor([temperature, min_p, top_k, top_p, numbers], dtype=torch.float64).to(scores.device)
    slices = _slices(scores)
    if has_kernels(scores.device, vocab=scores.shape[1]):
        from dibit.kernels.triton import sampling

        return torch.cat(
            [sampling.draw(scores[s].contiguous(), settings[:, s], top_k=any_k, top_p=any_p) for s in slices]
        )
    return torch.cat([_drawn(scores[s], settings[:, s], filtered=any_k or any_p) for s in slices])


def draw_or_highest(scores: Tensor, settings: Tensor, *, ids: Tensor, peaks: Tensor) -> Tensor:
    """What the next tokens of a captured step are: ids [R] int64 of scores [R, V] float32, of which `ids` [R] and
    `peaks` [R] are the highest. settings [5, R] float64, a row's at any time: temperature, 0 for the highest score;
    min_p, top_k, top_p and the number of `draw`. Needs the kernels; the launches are the same whatever the settings."""
    from dibit.kernels.triton import sampling

    return torch.cat(
        [
            sampling.draw(scores[s], settings[:, s], top_k=True, top_p=True, highest=(ids[s], peaks[s]))
            for s in _slices(scores)
        ]
    )


def warm_up(scores: Tensor) -> None:
    """Draws in every way there is, so that the first request finds kernels compiled. scores [R, V] float32."""
    rows = scores.shape[0]
    for k, p in itertools.product((0, 1), (1.0, 0.5)):
        draw(
            scores,
            temperature=[1.0] * rows,
            min_p=[0.0] * rows,
            top_k=[k] * rows,
            top_p=[p] * rows,
            numbers=[0.5] * rows,
        )


def has_kernels(device: torch.device, *, vocab: int) -> bool:
    """Whether the Triton kernels draw from rows of `vocab` scores on a device."""
    if vocab > MAX_DRAWN_COLUMNS:
        return False
    if device.type == "cuda":
        return availability.unavailable() is None
    return device.type == "cpu" and availability.interpreter_unavailable() is None


def _slices(scores: Tensor) -> list[slice]:
    """Rows that are drawn from at once."""
    rows = max(1, SLICE_BYTES // (4 * scores.shape[1]))
    return [slice(start, start + rows) for start in range(0, scores.shape[0], rows)]


def _drawn(scores: Tensor, settings: Tensor, *, filtered: bool) -> Tensor:
    temperature, min_p, top_k, top_p, number = settings.unsqueeze(2)
    scaled = (scores - scores.amax(1, keepdim=True)) / temperature.float()
    weights = scaled.exp()
    weights = torch.where(weights >= min_p.float(), weights, 0.0)
    if filtered:
        weights = _filtered(scaled, weights, top_k.long(), top_p)
    sums = weights.cumsum(1, dtype=torch.float64)
    total = sums[:, -1:]
    place = torch.searchsorted(sums, number * total, right=True)
    # Where rounding puts the target at the total, it belongs to the last token that has a weight.
    return torch.minimum(place, (sums < total).sum(1, keepdim=True)).clamp(max=scores.shape[1] - 1)[:, 0]


def _filtered(scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """weights [R, V], 0 where top_k [R, 1] or top_p [R, 1] leave a token out."""
    falling, order = scaled.sort(dim=1, descending=True, stable=True)
    left = (weights > 0).sum(1, keepdim=True)
    least = falling.gather(1, (top_k - 1).clamp(0, scaled.shape[1] - 1))
    count = torch.where((top_k > 0) & (top_k < left), (scaled >= least).sum(1, keepdim=True), left)
    sums = weights.gather(1, order).cumsum(1, dtype=torch.float64)
    total = sums.gather(1, (count - 1).clamp(min=0))
    held = torch.where(top_p < 1.0, (sums < top_p * total).sum(1, keepdim=True) + 1, count)
    within = torch.arange(scaled.shape[1], device=scaled.device) < torch.minimum(held, count)
    return torch.where(torch.zeros_like(within).scatter(1, order, within), weights, 0.0)
