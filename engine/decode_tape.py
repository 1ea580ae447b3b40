"""Decode steps without Python between the ops: recorded once per number of tokens, replayed from then on.

The decoder's ordinary forward runs while a recorder writes down what it calls (kernels/tape.py), from the embedding to
the token that is drawn. Everything that differs from step to step is read from buffers that are filled before each run:
tokens, positions, slots, lengths, block tables, how each row is drawn. The same ops run on the same numbers, so logits
and tokens are those of the ordinary path, bit for bit.

A tape's rows are sequences of one token each. Several tokens of one sequence are several rows with one block table, the
second one longer than the first, and so on: every layer writes the keys of all rows before any of them attends. So a
step that verifies drafts is a step like any other.

Memory: one Workspace with room for max_rows rows of activations and logits (shared by all tapes), block tables of
max_rows rows, and MAX_TAPES tapes of some ten words per op.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.kv_cache import KVCache
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import Request
from dibit.engine.sampler import Highest, prepare_draw
from dibit.engine.step import Chunk
from dibit.kernels import native
from dibit.kernels.sampling_cpu import Draws, sample
from dibit.kernels.tape import Tape, Workspace, record

MAX_TAPES = 64


@dataclass(frozen=True, slots=True)
class Decoded:
    """logits [R, V] float32 and what is highest in them or drawn from them, valid until the next step. Rows are the
    tokens of the step's chunks, drafts included, one after another."""

    logits: Tensor
    highest: Highest


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
        self._block_size = cache.block_size
        self.max_rows = max_rows
        self.refusal: str | None = None
        self.replay_s = 0.0
        self.workspace = Workspace(max_rows)
        self._cos, self._sin = cos, sin
        self._captured: OrderedDict[int, _Captured] = OrderedDict()
        self._width = -(-max_model_len // cache.block_size)
        # Arrays of plain numbers: an element is written in a tenth of the time that numpy or torch take.
        self._tokens, self._positions, self._slots = (array("q", bytes(8 * max_rows)) for _ in range(3))
        self._cu_seqlens = array("i", range(max_rows + 1))
        self._seq_lens = array("i", bytes(4 * max_rows))
        self._tables = array("i", bytes(4 * max_rows * self._width))
        self._written: list[list[int]] = [[] for _ in range(max_rows)]
        self._draws = Draws(max_rows)
        self._drawing: list[Request | None] = [None] * max_rows

    def __contains__(self, count: int) -> bool:
        return count in self._captured

    def run(self, chunks: Sequence[Chunk]) -> Decoded:
        """Computes a step. Raises NativeError naming the op that refused."""
        rows = self._fill(chunks)
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

    def _fill(self, chunks: Sequence[Chunk]) -> int:
        """Writes the tokens of a step into the buffers; how many there are."""
        size, row = self._block_size, 0
        for chunk in chunks:
            request, start = chunk.request, chunk.start
            blocks = request.block_ids
            plain = chunk.count == 1 and not chunk.drafts
            tokens = request.token_ids[start : chunk.stop] + list(chunk.drafts)
            for position, token in enumerate(tokens, start):
                self._tokens[row] = token
                self._positions[row] = position
                self._slots[row] = blocks[position // size] * size + position % size
                self._seq_lens[row] = position + 1
                if plain:
                    self._prepare(row, request)
                else:
                    self._prepare_ahead(row, chunk, position)
                if blocks != self._written[row]:
                    self._written[row] = blocks.copy()
                    entries = array("i", blocks[: self._width])
                    self._tables[row * self._width : row * self._width + len(entries)] = entries
                row += 1
        return row

    def _prepare(self, row: int, request: Request) -> None:
        if self._drawing[row] is request:
            self._draws.count(row, request.num_output)
            return
        prepare_draw(self._draws, row, request)
        # What is edited until min_tokens is drawn after it.
        self._drawing[row] = None if request.params.min_tokens else request

    def _prepare_ahead(self, row: int, chunk: Chunk, position: int) -> None:
        """One of several rows of a request, which another step may give to another one."""
        self._drawing[row] = None
        ahead = position + 1 - chunk.stop
        if ahead < 0 or chunk.odds:
            self._draws.greedy(row)
        else:
            prepare_draw(self._draws, row, chunk.request, ahead=ahead)

    @torch.inference_mode()
    def _capture(self, count: int) -> Decoded:
        """Computes the step in the buffers with torch and Python as they are, and keeps the tape of it."""
        batch = Batch(
            tokens=torch.frombuffer(self._tokens, dtype=torch.int64)[:count],
            positions=torch.frombuffer(self._positions, dtype=torch.int64)[:count],
            slots=torch.frombuffer(self._slots, dtype=torch.int64)[:count],
            cu_seqlens=torch.frombuffer(self._cu_seqlens, dtype=torch.int32)[: count + 1],
            seq_lens=torch.frombuffer(self._seq_lens, dtype=torch.int32)[:count],
            block_tables=torch.frombuffer(self._tables, dtype=torch.int32).view(-1, self._width)[:count],
        )
        with record(self.workspace) as recording:
            hidden = self.decoder.hidden(batch, self.cache, self._cos, self._sin)
            logits = self.decoder.logits(hidden)
            ids, peaks = self.decoder.ops.argmax(logits)
            drawn = sample(logits, ids, peaks, self._draws) if native.unavailable() is None else None
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
