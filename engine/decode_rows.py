"""The numbers of decode steps, a row for a token, in buffers that stay where they are.

What replays a step (decode_tape.py, decode_graph.py) reads everything that differs from step to step from here: tokens,
positions, slots, lengths, block tables, how each row is drawn. A row is a sequence of one token. Several tokens of one
sequence are several rows with one block table, the second one longer than the first, and so on: every layer writes the
keys of all rows before any of them attends. So a step that verifies drafts is a step like any other.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.draw import LEAST_TEMPERATURE, uniform
from dibit.engine.request import Request
from dibit.engine.sampler import Highest, prepare_draw
from dibit.engine.step import Chunk
from dibit.kernels import native
from dibit.kernels.sampling_cpu import Draws, uniforms


@dataclass(frozen=True, slots=True)
class Decoded:
    """logits [R, V] float32 and what is highest in them or drawn from them, valid until the next step. Rows are the
    tokens of the step's chunks, drafts included, one after another."""

    logits: Tensor
    highest: Highest


class DecodeRows:
    """Room for `max_rows` rows whose block tables have `width` entries of blocks of `block_size` tokens."""

    def __init__(self, max_rows: int, *, width: int, block_size: int) -> None:
        self.max_rows = max_rows
        self.width = width
        self.block_size = block_size
        self.draws = Draws(max_rows)
        # Arrays of plain numbers: an element is written in a tenth of the time that numpy or torch take.
        self._tokens, self._positions, self._slots = (array("q", bytes(8 * max_rows)) for _ in range(3))
        self._cu_seqlens = array("i", range(max_rows + 1))
        self._seq_lens = array("i", bytes(4 * max_rows))
        self._tables = array("i", bytes(4 * max_rows * width))
        self._written: list[list[int]] = [[] for _ in range(max_rows)]
        self._drawing: list[Request | None] = [None] * max_rows

    def fill(self, chunks: Sequence[Chunk]) -> int:
        """Writes the tokens of a step; how many there are."""
        size, row = self.block_size, 0
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
                    entries = array("i", blocks[: self.width])
                    self._tables[row * self.width : row * self.width + len(entries)] = entries
                row += 1
        return row

    def _prepare(self, row: int, request: Request) -> None:
        if self._drawing[row] is request:
            self.draws.count(row, request.num_output)
            return
        prepare_draw(self.draws, row, request)
        # What is edited until min_tokens is drawn after it.
        self._drawing[row] = None if request.params.min_tokens else request

    def _prepare_ahead(self, row: int, chunk: Chunk, position: int) -> None:
        """One of several rows of a request, which another step may give to another one."""
        self._drawing[row] = None
        ahead = position + 1 - chunk.stop
        judged = bool(chunk.odds) and ahead < len(chunk.drafts)
        if ahead < 0 or judged:
            self.draws.greedy(row)
        else:
            prepare_draw(self.draws, row, chunk.request, ahead=ahead)

    def pad(self, first: int, stop: int) -> None:
        """Makes rows [first, stop) compute something that nobody reads and write nothing."""
        for row in range(first, stop):
            self._tokens[row] = self._positions[row] = 0
            self._slots[row] = -1
            self._seq_lens[row] = 1
            self._tables[row * self.width] = 0
            self._written[row] = []
            self._drawing[row] = None
            self.draws.greedy(row)

    def draw_settings(self, count: int) -> NDArray[np.float64] | None:
        """How the first `count` rows are drawn, [5, count] as device_sampling.draw_or_highest takes it; None where all
        take the highest score."""
        words = np.frombuffer(self.draws.words, dtype=np.uint64).reshape(-1, 5)[:count]
        greedy = words[:, 0] != 0
        if greedy.all():
            return None
        filters = np.frombuffer(self.draws.filters, dtype=np.float64).reshape(-1, 3)[:count]
        temperature = np.where(greedy, 0.0, np.maximum(filters[:, 0], LEAST_TEMPERATURE))
        if native.unavailable() is None:
            numbers = np.frombuffer(uniforms(self.draws), dtype=np.float64)[:count]
        else:
            numbers = np.array([uniform(low | high << 64, at) for _, _, low, high, at in words.tolist()])
        return np.stack([temperature, filters[:, 1], words[:, 1].astype(np.float64), filters[:, 2], numbers])

    def longest(self, count: int) -> int:
        """Keys of the longest of the first `count` rows."""
        return max(self._seq_lens[:count])

    def batch(self, count: int) -> Batch:
        """The first `count` rows. The tensors are the buffers themselves."""
        return Batch(
            tokens=torch.frombuffer(self._tokens, dtype=torch.int64)[:count],
            positions=torch.frombuffer(self._positions, dtype=torch.int64)[:count],
            slots=torch.frombuffer(self._slots, dtype=torch.int64)[:count],
            cu_seqlens=torch.frombuffer(self._cu_seqlens, dtype=torch.int32)[: count + 1],
            seq_lens=torch.frombuffer(self._seq_lens, dtype=torch.int32)[:count],
            block_tables=torch.frombuffer(self._tables, dtype=torch.int32).view(-1, self.width)[:count],
        )
