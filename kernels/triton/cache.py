"""How the KV cache is handed to the kernels that write and read its rows (device/cache.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dibit.kernels.contract import ContractError
from dibit.kernels.kv import FP8, INT4, INT8, REALS, head_dim

TYPES = frozenset({*REALS, FP8, INT8, INT4})


@dataclass(frozen=True)
class Side:
    """Keys or values: the cache, of e4m3 its bytes; its memory as float16 where rows hold codes; the bits of a code or
    of e4m3 (16: floats); the elements of a row."""

    cache: Tensor
    grid: Tensor | None
    bits: int
    width: int

    @classmethod
    def of(cls, cache: Tensor, name: str) -> Side:
        """Raises ContractError for rows whose float16 numbers do not lie at even bytes."""
        if cache.dtype == FP8:
            return cls(cache.view(torch.uint8), None, 8, cache.shape[3])
        d = head_dim(cache)
        bits = {INT8: 8, INT4: 4}.get(cache.dtype, 16)
        if bits == 4 and d % 4:
            raise ContractError(
                f"{name} has rows of 4-bit codes of a head dim of {d}, which must be a multiple of 4 on a GPU; choose "
                "int8 or a float type"
            )
        return cls(cache, None if bits == 16 else cache.view(torch.float16), bits, cache.shape[3])


def block_columns(d: int, *sides: Side) -> int:
    """Columns of a program's tile, a power of 2: matrix instructions want 16, of the halves of 4-bit rows too."""
    least = 32 if any(side.bits == 4 for side in sides) else 16
    return max(least, int(triton.next_power_of_2(d)))
