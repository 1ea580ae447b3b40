"""Decode steps on a GPU without launches from Python: captured once as a CUDA graph, replayed from then on.

A step of a few tokens is some hundred kernels of a few microseconds each, and Python needs longer than that to launch
one. A graph is launched once. What differs from step to step is copied into fixed buffers on the device first; the
host waits once, for the ids that were chosen.

A graph has a fixed number of rows and a fixed width of block tables, on which the grid of attention depends. There is
one for every `row_bucket` and `table_bucket` that has come up, and where kernels draw one more for steps in which a row
is drawn: it searches for the bars of top_k and top_p whether a row has one or not. Rows beyond a step's own write
nothing and are not read.

Memory: graphs share one pool, as no two run at once, which memory_plan.activation_bytes counts; at most MAX_GRAPHS are
kept.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.decode_rows import Decoded, DecodeRows
from dibit.engine.device_sampling import draw_or_highest, has_kernels
from dibit.engine.kv_cache import KVCache
from dibit.engine.models.decoder import Decoder
from dibit.engine.sampler import Highest
from dibit.engine.step import Chunk

MAX_GRAPHS = 128
# Keys of the shortest block table. Splits of attention's keys that have none cost little, graphs cost memory.
LEAST_KEYS = 512


def row_bucket(count: int) -> int:
    """Rows of the graph for `count` tokens: less than a quarter more, and four graphs for every doubling."""
    quantum = max(1, (1 << (count - 1).bit_length()) // 8)
    return -(-count // quantum) * quantum


def table_bucket(keys: int, *, block_size: int, width: int) -> int:
    """Entries of its block tables for sequences of up to `keys` keys, of which there are LEAST_KEYS, or twice as many,
    and so on; at most `width`."""
    room = LEAST_KEYS
    while room < keys:
        room *= 2
    return min(width, -(-room // block_size))


class Capture(Protocol):
    """Makes what a function does on a device repeatable, on the same memory. Raises RuntimeError where that is not
    possible. The function may be run any number of times meanwhile."""

    def __call__(self, run: Callable[[], None], /) -> Callable[[], None]: ...


class CudaCapture:
    """Captures into CUDA graphs that share a pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # Kernels are compiled and libraries make their workspaces when they first run, which a capture forbids.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: a draft model, or the next model while it loads.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


class _Buffers:
    """The numbers of a step on the host and on the device, in the same order, so that two copies bring all of them:
    its batch, and how rows are drawn (`settings`, as device_sampling.draw_or_highest takes them).

    Every column starts at a multiple of 16 bytes where it can: kernels are compiled once more for one that does not.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._rows = rows
        column = rows + rows % 2
        self._host_long = torch.zeros(3 * column + 5 * rows, dtype=torch.int64, pin_memory=pinned)
        self._host_int = torch.zeros(rows * (1 + width), dtype=torch.int32, pin_memory=pinned)
        self._long = torch.zeros_like(self._host_long, device=device)
        self._int = torch.zeros_like(self._host_int, device=device)
        columns, self.settings = self._parts(self._long)
        self.batch = Batch(
            tokens=columns[0],
            positions=columns[1],
            slots=columns[2],
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device),
            seq_lens=self._int[rows * width :],
            block_tables=self._int[: rows * width].view(rows, width),
        )

    def _parts(self, long: Tensor) -> tuple[Tensor, Tensor]:
        """[3, rows] int64 and [5, rows] float64."""
        column = self._rows + self._rows % 2
        return long[: 3 * column].view(3, column)[:, : self._rows], long[3 * column :].view(torch.float64).view(5, -1)

    def fill(self, numbers: Batch, settings: NDArray[np.float64] | None) -> None:
        """Starts the copy of a step's numbers; block tables may be wider than here."""
        rows, width = self.batch.block_tables.shape
        columns, places = self._parts(self._host_long)
        for place, column in zip(columns, (numbers.tokens, numbers.positions, numbers.slots), strict=True):
            place.copy_(column)
        if settings is not None:
            places.copy_(torch.from_numpy(settings))
        self._host_int[: rows * width].view(rows, width).copy_(numbers.block_tables[:, :width])
        self._host_int[rows * width :].copy_(numbers.seq_lens)
        self._long.copy_(self._host_long, non_blocking=True)
        self._int.copy_(self._host_int, non_blocking=True)


class _Results:
    """What steps come to, of all graphs in the same memory: logits [R, V] float32 on the device; there and on the host
    the highest scores' ids [R] int64 and peaks [R] float32 and, where rows were drawn, the drawn ids [R] int64."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.logits = torch.empty(rows, vocab, dtype=torch.float32, device=device)
        # Side by side, so that one copy brings them.
        self._found = torch.empty(3, rows, dtype=torch.int64, device=device)
        self._host_found = torch.empty(3, rows, dtype=torch.int64, pin_memory=pinned)
        self._done = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def keep(self, logits: Tensor, ids: Tensor, peaks: Tensor, drawn: Tensor | None) -> None:
        rows = logits.shape[0]
        self.logits[:rows].copy_(logits)
        places, heights, draws = _parts_found(self._found)
        places[:rows].copy_(ids)
        heights[:rows].copy_(peaks)
        if drawn is not None:
            draws[:rows].copy_(drawn)

    def fetch(self, count: int, *, drawn: bool) -> Decoded:
        """Waits for the first `count` rows."""
        self._host_found.copy_(self._found, non_blocking=True)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
        ids, peaks, draws = (part[:count].numpy() for part in _parts_found(self._host_found))
        return Decoded(self.logits[:count], Highest(ids, peaks, draws.data if drawn else None))


def _parts_found(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids, peaks and drawn ids of what `_Results` keeps."""
    return found[0], found[1].view(torch.float32)[: found.shape[1]], found[2]


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    buffers: _Buffers


class DecodeGraphs:
    """Runs steps of up to `max_rows` tokens. One thread at a time.

    The decoder, the cache and the rope tables must stay the ones it was made for. `refusal` says why steps are not
    replayed, or is None; `replay_s` counts the seconds spent in replays, waiting for the ids included.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
        *,
        max_rows: int,
        max_model_len: int,
        capture: Capture,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.max_rows = max_rows
        self.refusal: str | None = None
        self.replay_s = 0.0
        width = -(-max_model_len // cache.block_size)
        self.rows = DecodeRows(row_bucket(max_rows), width=width, block_size=cache.block_size)
        self._cos, self._sin = cos, sin
        self._capture = capture
        self._results = _Results(self.rows.max_rows, decoder.sizes.vocab, decoder.device)
        self._draws = has_kernels(decoder.device, vocab=decoder.sizes.vocab)
        self._captured: OrderedDict[tuple[int, int, bool], _Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, chunks: Sequence[Chunk]) -> Decoded:
        """Computes a step."""
        count = self.rows.fill(chunks)
        rows = row_bucket(count)
        self.rows.pad(count, rows)
        width = table_bucket(self.rows.longest(count), block_size=self.cache.block_size, width=self.rows.width)
        return self._run(count, rows, width, self.rows.draw_settings(rows) if self._draws else None)

    def warm_up(self) -> int:
        """Captures the graphs of short sequences, so that no request waits for one. How many there are."""
        width = table_bucket(1, block_size=self.cache.block_size, width=self.rows.width)
        # The largest first: what it takes from the pool is enough for the others.
        for rows in sorted({row_bucket(count) for count in range(1, self.max_rows + 1)}, reverse=True):
            for settings in (np.zeros((5, rows)), None) if self._draws else (None,):
                if self.refusal is None:
                    self.rows.pad(0, rows)
                    self._run(0, rows, width, settings)
        return len(self)

    @torch.inference_mode()
    def _run(self, count: int, rows: int, width: int, settings: NDArray[np.float64] | None) -> Decoded:
        draws = settings is not None
        captured = self._captured.get((rows, width, draws))
        numbers = self.rows.batch(rows)
        started_s = time.perf_counter()
        if captured is None:
            buffers = _Buffers(rows, width, self.decoder.device)
            buffers.fill(numbers, settings)
            compute = functools.partial(self._compute, buffers.batch, buffers.settings if draws else None)
            try:
                captured = _Captured(self._capture(compute), buffers)
            except RuntimeError as error:
                self.refusal = f"{type(error).__name__}: {error}"
                compute()
                return self._results.fetch(count, drawn=draws)
            self._captured[rows, width, draws] = captured
            if len(self._captured) > MAX_GRAPHS:
                self._captured.popitem(last=False)
        else:
            self._captured.move_to_end((rows, width, draws))
            captured.buffers.fill(numbers, settings)
        captured.replay()
        decoded = self._results.fetch(count, drawn=draws)
        self.replay_s += time.perf_counter() - started_s
        return decoded

    def _compute(self, batch: Batch, settings: Tensor | None) -> None:
        logits = self.decoder.logits(self.decoder.hidden(batch, self.cache, self._cos, self._sin))
        ids, peaks = self.decoder.ops.argmax(logits)
        drawn = None if settings is None else draw_or_highest(logits, settings, ids=ids, peaks=peaks)
        self._results.keep(logits, ids, peaks, drawn)
