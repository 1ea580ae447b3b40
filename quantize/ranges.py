"""What goes into the linears of a block: the largest magnitude of every channel, and the root mean square.

Collected while the calibration text passes through the quantized block, as it does anyway to reach the next one, so it
costs a look at each hidden state. The ranges tell whether low-bit activations stand a chance: one channel that is a
hundred times louder than the median one takes the scale for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dibit.engine.models.decoder import Block, Linear
from dibit.engine.models.spec import LinearSite
from dibit.quantize.report import CHANNEL_QUANTILES, InputRange

LARGEST = 3


class ChannelRange:
    """Running range of the rows of inputs [..., K]."""

    def __init__(self, k: int) -> None:
        self._highest = torch.zeros(k)
        self._squares = 0.0
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._highest = torch.maximum(self._highest, rows.abs().amax(dim=0))
        self._squares += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
        self._tokens += rows.shape[0]

    def report(self) -> InputRange:
        count = self._tokens * self._highest.numel()
        quantiles = torch.quantile(self._highest, torch.tensor(CHANNEL_QUANTILES))
        top = self._highest.topk(min(LARGEST, self._highest.numel()))
        return InputRange(
            tokens=self._tokens,
            rms=math.sqrt(self._squares / count) if count else math.nan,
            quantiles=tuple(quantiles.tolist()),
            largest=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )


@contextmanager
def recorded_inputs(block: Block, sites: Sequence[LinearSite]) -> Iterator[Mapping[str, ChannelRange]]:
    """Ranges by site name, of everything that passes through `block` inside the context."""
    ranges = {site.name: ChannelRange(site.k) for site in sites}
    own = dict(block.linears)
    for site in sites:
        block.linears[site.key] = _listening(own[site.key], ranges[site.name])
    try:
        yield ranges
    finally:
        block.linears.update(own)


def _listening(linear: Linear, heard: ChannelRange) -> Linear:
    def call(x: Tensor, /) -> Tensor:
        heard.add(x)
        return linear(x)

    return call
