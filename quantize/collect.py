"""What flows into a linear of a block: captured without computing what follows it, and summed up as statistics.

With `cross` the float model's block runs beside the quantized one, on the same tokens; the last eighth of the segments
is kept apart there, so that a method can tell what it learned from what it memorised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NoReturn, cast

from torch import Tensor

from dibit.engine.models.decoder import Block, Linear
from dibit.engine.models.spec import LinearSite
from dibit.quantize.activations import RoundedInput
from dibit.quantize.stats import HessianSum, Stats
from dibit.quantize.streams import HiddenStates

HELD_OUT_SHARE = 8


def inputs(
    block: Block, key: str, stream: HiddenStates, cos: Tensor, sin: Tensor, *, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """(first segment, inputs [<= batch, T, K] of the linear `key`) over the whole stream."""
    linear = block.linears[key]
    tap = _Tap()
    # Of a linear that rounds its input, what is left after that.
    taken = RoundedInput(cast(Linear, tap), linear.bits) if isinstance(linear, RoundedInput) else cast(Linear, tap)
    for start, x in stream.batches(batch):
        block.linears[key] = taken
        try:
            with suppress(_Reached):
                block.dense(x, cos, sin)
        finally:
            block.linears[key] = linear
        yield start, tap.seen


class _Reached(Exception):
    """What follows the tapped linear is not computed."""


class _Tap:
    seen: Tensor

    def __call__(self, x: Tensor) -> NoReturn:
        self.seen = x
        raise _Reached


def collect(
    site: LinearSite,
    block: Block,
    quantized: HiddenStates,
    cos: Tensor,
    sin: Tensor,
    *,
    batch: int,
    floats: tuple[Block, HiddenStates] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    shared_weights: Tensor | None = None,
) -> tuple[Stats, ...]:
    """Statistics of the inputs of `site` in `block` on the stream that the quantized blocks before it produce.

    floats   the float block and its stream: `cross` and `held_out` are wanted too
    weights  [samples, T] of the tokens, by module name of the parts
    shared_weights  [samples, T], the same for all parts, on top of those
    returns  one for all parts; with weights one for each
    """
    samples = quantized.shape[0]
    border = samples if floats is None else max(1, samples - max(1, samples // HELD_OUT_SHARE))
    own = [shared_weights] if weights is None else [weights[part.module] for part in site.parts]
    if weights is not None and shared_weights is not None:
        own = [mine * shared_weights for mine in own if mine is not None]
    sums = [[_Sums(site.k, cross=floats is not None) for _ in range(2)] for _ in own]
    others: Iterator[tuple[int, Tensor | None]]
    if floats is None:
        others = ((start, None) for start in range(0, samples, batch))
    else:
        others = inputs(floats[0], site.key, floats[1], cos, sin, batch=batch)
    for (start, x), (_, y) in zip(inputs(block, site.key, quantized, cos, sin, batch=batch), others, strict=True):
        middle = min(max(border - start, 0), x.shape[0])
        for side, part in enumerate((slice(0, middle), slice(middle, None))):
            if x[part].shape[0] == 0:
                continue
            for mine, pair in zip(own, sums, strict=True):
                weight = None if mine is None else mine[start : start + x.shape[0]][part]
                pair[side].add(x[part], None if y is None else y[part], weight)
    return tuple(seen.stats(None if floats is None else held_out.stats()) for seen, held_out in sums)


class _Sums:
    def __init__(self, k: int, *, cross: bool) -> None:
        self._hessian, self._k = HessianSum(k), k
        self._cross = HessianSum(k) if cross else None

    def add(self, x: Tensor, y: Tensor | None, weights: Tensor | None) -> None:
        self._hessian.add(x, weights=weights)
        if self._cross is not None:
            self._cross.add(x, y, weights=weights)

    def stats(self, held_out: Stats | None = None) -> Stats:
        cross = None if self._cross is None else self._cross.mean
        return Stats(self._hessian.tokens, self._hessian.mean, cross, held_out)
