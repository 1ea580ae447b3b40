"""Decode steps without Python between the ops: recorded once per number of tokens, replayed from then on.

The decoder's ordinary forward runs while a recorder writes down what it calls (kernels/tape.py), from the embedding to
the token that is drawn. What differs from step to step is read from buffers that are filled before each run
(decode_rows.py). The same ops run on the same numbers: logits and tokens are those of the ordinary path, bit for bit.

Memory: one Workspace with room for max_rows rows of activations and logits (shared by all tapes), block tables of
max_rows rows, and MAX_TAPES tapes of some ten words per op.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.decode_rows import Decoded, DecodeRows
from dibit.engine.kv_cache import KVCache
from dibit.engine.models.decoder import Decoder
from dibit.engine.sampler import Highest
from dibit.engine.step import Chunk
from dibit.kernels import native
from dibit.kernels.sampling_cpu import sample
from dibit.kernels.tape import Tape, Workspace, record

MAX_TAPES = 64


@dataclass(frozen=True, slots=True)
class _Captured:
    tape: Tape
    batch: Batch
    decoded: Decoded


class DecodeTapes:
    """Runs steps of up to `max_rows` tokens. One thread at a time.

    The decoder, the cache and the rope tables must stay the ones it was made for. `refusal` says why steps are not
    replayed, or is None; `replay_s` counts the seconds spent in tapes.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, cos: Tensor, sin: Tensor, *, max_rows: int, max_model_len: int
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.max_rows = max_rows
        self.refusal: str | None = None
        self.replay_s = 0.0
        self.workspace = Workspace(max_rows)
        self._cos, self._sin = cos, sin
        self._captured: OrderedDict[int, _Captured] = OrderedDict()
        self.rows = DecodeRows(max_rows, width=-(-max_model_len // cache.block_size), block_size=cache.block_size)

    def __contains__(self, count: int) -> bool:
        return count in self._captured

    def run(self, chunks: Sequence[Chunk]) -> Decoded:
        """Computes a step. Raises NativeError naming the op that refused."""
        rows = self.rows.fill(chunks)
        captured = self._captured.get(rows)
        if captured is None:
            return self._capture(rows)
        self._captured.move_to_end(rows)
        started_s = time.perf_counter()
        captured.tape.run()
        self.replay_s += time.perf_counter() - started_s
        return captured.decoded

    def tape(self, count: int) -> Tape | None:
        """The tape for steps of `count` tokens, if one was recorded. Running it again computes the last such step
        again: every value it changes is made anew from the buffers."""
        captured = self._captured.get(count)
        return None if captured is None else captured.tape

    @torch.inference_mode()
    def _capture(self, count: int) -> Decoded:
        """Computes the step in the buffers with torch and Python as they are, and keeps the tape of it."""
        batch = self.rows.batch(count)
        with record(self.workspace) as recording:
            hidden = self.decoder.hidden(batch, self.cache, self._cos, self._sin)
            logits = self.decoder.logits(hidden)
            ids, peaks = self.decoder.ops.argmax(logits)
            drawn = sample(logits, ids, peaks, self.rows.draws) if native.unavailable() is None else None
        decoded = Decoded(
            logits, Highest(ids.numpy().data, peaks.numpy().data, None if drawn is None else drawn.numpy().data)
        )
        tape = recording.tape()
        if tape is None:
            self.refusal = recording.refusal
        else:
            self._captured[count] = _Captured(tape, batch, decoded)
            if len(self._captured) > MAX_TAPES:
                self._captured.popitem(last=False)
        return decoded
