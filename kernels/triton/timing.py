"""How long launches take on the GPU, without the time that Python needs to make them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 << 20
"""More than any second-level cache holds."""
ROUNDS = 5


def cold_copies(nbytes: int) -> int:
    """Copies of `nbytes` that, read in turn, come from memory every time."""
    return max(2, -(-COLD_BYTES // nbytes))


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one call, out of ROUNDS replays of a CUDA graph that makes all of them."""
    warm = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[1:])
