"""How much of this machine's speed a training reaches: its floating-point operations in matrix products per second,
over those of one large float32 product, measured in the same process with the same threads.

What else a step computes (attention, norms, rounding, the optimizer) counts as time and not as work, so the share says
what there is left to gain.
"""

from __future__ import annotations

import functools
import time

import torch

# Operations of a product of this size in all three dimensions: enough to keep every core busy for milliseconds.
_SIZE = 1024
_REPEATS = 5


@functools.cache
def matmul_peak(threads: int) -> float:
    """Floating-point operations per second of a float32 product, the best of a few, with torch's `threads` threads."""
    a, b = (torch.full((_SIZE, _SIZE), 0.5) for _ in range(2))
    out = torch.empty(_SIZE, _SIZE)
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        torch.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - begun)
    return 2 * _SIZE**3 / best


def matmul_share(operations: float, seconds: float) -> float:
    """Share of the peak that `operations` in `seconds` are; 0 for no time."""
    return operations / seconds / matmul_peak(torch.get_num_threads()) if seconds > 0 else 0.0
