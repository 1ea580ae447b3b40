"""Sizes of the GPU kernels that others plan by, triton installed or not."""

from __future__ import annotations

MAX_DRAWN_COLUMNS = 1 << 18
"""Scores of a row that a token is drawn from (sampling.py): sums of weights are 64-bit integers."""

SPLIT_KEYS = 512
"""Keys that attention sums apart from others (attention.py)."""

SIDE_BY_SIDE_TOKENS = 64
"""Up to so many tokens each has its splits summed by programs of their own (attention.py)."""
