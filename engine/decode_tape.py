"""Decode steps without Python between the ops: recorded once per number of sequences, replayed from then on.

The decoder's ordinary forward runs while a recorder writes down what it calls (kernels/tape.py), from the embedding to
the highest logit. Everything that differs from step to step is read from buffers that are filled before each run:
tokens, positions, slots, lengths, block tables. The same ops run on the same numbers, so the logits are those of the
ordinary path, bit for bit.

Memory: one Workspace with room for max_seqs rows of activations and logits (shared by all tapes), block tables of
max_seqs rows, and MAX_TAPES tapes of some ten words per op.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.kv_cache import KVCache
from dibit.engine.models.decoder import Decoder
from dibit.engine.sampler import Highest
from dibit.engine.step import Chunk
from dibit.kernels.tape import Tape, Workspace, record

MAX_TAPES = 64


@dataclass(frozen=True, slots=True)
class Decoded:
    """logits [B, V] float32 and what is highest in them, valid until the next step."""

    logits: Tensor
    highest: Highest


@dataclass(frozen=True, slots=True)
class _Captured:
    tape: Tape
    batch: Batch
    decoded: Decoded


class DecodeTapes:
    """Runs steps of one token for each of up to `max_seqs` sequences. One thread at a time.

    The decoder, the cache and the rope tables must stay the ones it was made for. `refusal` says why steps are not
    replayed, or is None.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, cos: Tensor, sin: Tensor, *, max_seqs: int, max_model_len: int
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.max_seqs = max_seqs
        self.refusal: str | None = None
        self.workspace = Workspace(max_seqs)
        self._cos, self._sin = cos, sin
        self._captured: OrderedDict[int, _Captured] = OrderedDict()
        width = -(-max_model_len // cache.block_size)
        self._tokens = np.zeros(max_seqs, dtype=np.int64)
        self._positions = np.zeros(max_seqs, dtype=np.int64)
        self._slots = np.zeros(max_seqs, dtype=np.int64)
        self._cu_seqlens = np.arange(max_seqs + 1, dtype=np.int32)
        self._seq_lens = np.zeros(max_seqs, dtype=np.int32)
        self._tables = np.zeros((max_seqs, width), dtype=np.int32)
        self._written: list[list[int]] = [[] for _ in range(max_seqs)]

    def __contains__(self, count: int) -> bool:
        return count in self._captured

    def run(self, chunks: Sequence[Chunk]) -> Decoded:
        """Computes a step of chunks of one token each. Raises NativeError naming the op that refused."""
        self._fill(chunks)
        captured = self._captured.get(len(chunks))
        if captured is None:
            return self._capture(len(chunks))
        self._captured.move_to_end(len(chunks))
        captured.tape.run()
        return captured.decoded

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        count, size, width = len(chunks), self.cache.block_size, self._tables.shape[1]
        starts = [chunk.start for chunk in chunks]
        self._tokens[:count] = [chunk.request.token_ids[chunk.start] for chunk in chunks]
        self._positions[:count] = starts
        self._slots[:count] = [chunk.request.block_ids[chunk.start // size] for chunk in chunks]
        self._slots[:count] *= size
        self._slots[:count] += self._positions[:count] % size
        self._seq_lens[:count] = self._positions[:count] + 1
        for row, chunk in enumerate(chunks):
            blocks = chunk.request.block_ids
            if blocks != self._written[row]:
                self._written[row] = blocks.copy()
                self._tables[row, : len(blocks)] = blocks[:width]

    @torch.inference_mode()
    def _capture(self, count: int) -> Decoded:
        """Computes the step in the buffers with torch and Python as they are, and keeps the tape of it."""
        batch = Batch(
            tokens=torch.from_numpy(self._tokens)[:count],
            positions=torch.from_numpy(self._positions)[:count],
            slots=torch.from_numpy(self._slots)[:count],
            cu_seqlens=torch.from_numpy(self._cu_seqlens)[: count + 1],
            seq_lens=torch.from_numpy(self._seq_lens)[:count],
            block_tables=torch.from_numpy(self._tables)[:count],
        )
        with record(self.workspace) as recording:
            hidden = self.decoder.hidden(batch, self.cache, self._cos, self._sin)
            logits = self.decoder.logits(hidden)
            ids, peaks = self.decoder.ops.argmax(logits)
        decoded = Decoded(logits, Highest(ids.numpy(), peaks.numpy()))
        tape = recording.tape()
        if tape is None:
            self.refusal = recording.refusal
        else:
            self._captured[count] = _Captured(tape, batch, decoded)
            if len(self._captured) > MAX_TAPES:
                self._captured.popitem(last=False)
        return decoded
