"""Chunks of prompts that are computed some layers a step: what is kept of one between its steps.

A slice starts from the hidden states that the last one left and leaves its own beside them, so that a step that failed
can be run again. There is one chunk at a time: another one's first slice takes the place of what is kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.kv_cache import KVCache
from dibit.engine.models.decoder import Decoder, Stream
from dibit.engine.step import Chunk


@dataclass(slots=True)
class _Kept:
    """A chunk's batch, and its hidden states before the layers at which slices of it started."""

    chunk: Chunk
    batch: Batch
    before: dict[int, Stream] = field(default_factory=dict)

    def belongs_to(self, chunk: Chunk) -> bool:
        own = self.chunk
        return own.request is chunk.request and (own.start, own.count) == (chunk.start, chunk.count)


class PromptSlices:
    """Runs slices of chunks. Raises RuntimeError for one whose first layers it has not seen last."""

    def __init__(self, decoder: Decoder, cache: KVCache, cos: Tensor, sin: Tensor) -> None:
        self._decoder = decoder
        self._cache = cache
        self._cos, self._sin = cos, sin
        self._kept: _Kept | None = None

    def begin(self, chunk: Chunk, batch: Batch) -> None:
        """`batch` is the step of `chunk` alone."""
        self._kept = _Kept(chunk, batch, {0: (self._decoder.embedding(batch.tokens), None)})

    def run(self, chunk: Chunk) -> Tensor | None:
        """The layers of `chunk`; after the last one, the final hidden states [R, hidden] of its batch's rows."""
        kept, first, stop = self._kept, chunk.first_layer, chunk.last_layer
        if kept is None or not kept.belongs_to(chunk) or first not in kept.before:
            raise RuntimeError(
                f"layer {first} of tokens {chunk.start} to {chunk.stop} comes before the layers under it"
            )
        x, residual = kept.before[first]
        own = (x.clone(), None) if residual is None else (x, residual.clone())
        stream = self._decoder.through(own, kept.batch, self._cache, self._cos, self._sin, first=first, stop=stop)
        if stop is not None:
            kept.before = {first: kept.before[first], stop: stream}
            return None
        return self._decoder.normed(stream)


def at_once(chunk: Chunk) -> Chunk:
    """The chunk with all of its layers."""
    return dataclasses.replace(chunk, first_layer=0, last_layer=None)
