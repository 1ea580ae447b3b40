"""The read bandwidth of main memory: the limit that a memory-bound op is held against.

Measured with the kernels' own threads, reading ascending streams with the prefetch distance of the kernels, on memory
in 2 MB pages. Only figures of one run may be compared: on shared machines bandwidth moves from minute to minute.
"""

from __future__ import annotations

import ctypes
import statistics
import time

import torch

from dibit.kernels import native

# About what one op reads, so that an interruption spoils one slice as it spoils one op, and medians compare.
SLICE_BYTES = 16 << 20


class ReadLoop:
    """A buffer of `nbytes` (several times the last-level cache, or the figure is the cache's) and the loop over it."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.empty(nbytes // 4, dtype=torch.int32)
        native.function("dibit_advise_huge", native.POINTER, native.INT)(self.buffer.data_ptr(), nbytes)
        self.buffer.fill_(1)
        self.read = native.function("dibit_read", native.POINTER, native.INT, ctypes.POINTER(ctypes.c_uint64))

    def gb_s(self) -> float:
        """One pass on the threads that the kernels use now: the median slice, in 1e9 bytes a second."""
        total = ctypes.c_uint64()
        size = min(SLICE_BYTES, self.buffer.nbytes)
        times_s = []
        for offset in range(0, self.buffer.nbytes - size + 1, size):
            started_s = time.perf_counter()
            self.read(self.buffer.data_ptr() + offset, size, ctypes.byref(total))
            times_s.append(time.perf_counter() - started_s)
        return size / statistics.median(times_s) / 1e9


def read_bandwidth(threads: int, nbytes: int, *, passes: int = 3) -> float:
    """Median read bandwidth over `passes`, GB/s (1e9 bytes). The kernels' thread count is put back afterwards."""
    before = native.threads()
    native.set_threads(threads)
    try:
        loop = ReadLoop(nbytes)
        return statistics.median(loop.gb_s() for _ in range(passes))
    finally:
        native.set_threads(before)
