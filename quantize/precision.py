"""The type in which training multiplies matrices.

Everything trained, hidden states, sums and optimizer states are float32. The products themselves, forward and back,
may take bfloat16 inputs (Micikevicius et al., "Mixed Precision Training", ICLR 2018; bfloat16 needs no scaling of the
loss). CPUs with matrix units (AMX) multiply those six times as fast, others no faster or far slower, so `auto` looks
at the CPU; what it finds depends on nothing that was measured, so that a continued run decides as it did before.
Losses that choose between states are always computed in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from dibit.engine.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def check_precision(precision: str) -> None:
    """Raises ConfigError for an unknown one."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; supported: {', '.join(PRECISIONS)}")


def product_type(precision: str) -> torch.dtype:
    """bfloat16 or float32."""
    if precision == "auto":
        return torch.bfloat16 if _matrix_units() else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def products(precision: str) -> AbstractContextManager[object]:
    """Within it, torch multiplies in `product_type`."""
    dtype = product_type(precision)
    return nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype=dtype)


def _matrix_units() -> bool:
    # Not public, so it may go away; without it the answer is the slower one that is always right.
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported is not None and supported())
