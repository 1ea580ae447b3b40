"""Sizes of GPUs, and of the kernels, that others plan by, triton installed or not."""

from __future__ import annotations

REGISTERS = 65536
"""Of a processor."""
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that a program may have, by architecture."""
MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
"""Of a processor at once."""

MAX_DRAWN_COLUMNS = 1 << 18
"""Scores of a row that a token is drawn from (sampling.py): sums of weights are 64-bit integers."""

SPLIT_KEYS = 512
"""Keys that attention sums apart from others (attention.py)."""

SIDE_BY_SIDE_TOKENS = 64
"""Up to so many tokens each has its splits summed by programs of their own (attention.py)."""


def resident_programs(*, registers: int, shared_bytes: int, warps: int, arch: int) -> int:
    """Programs of so many registers a thread that a processor holds at once. An architecture that is not listed is
    taken for the one before it."""
    known = max(one for one in SHARED_BYTES if one <= arch)
    # Registers are handed out to a warp in units of 256; a kilobyte of shared memory is the system's.
    by_registers = REGISTERS // (-(-max(1, registers) * 32 // 256) * 256 * warps)
    by_shared = (SHARED_BYTES[known] + 1024) // (shared_bytes + 1024)
    return min(by_registers, by_shared, MAX_WARPS[known] // warps)
