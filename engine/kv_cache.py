"""The keys and values of every layer, in blocks that the scheduler hands out.

Which sequence owns a block is the scheduler's knowledge alone; here a block is an index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dibit.engine.config import KVType
from dibit.engine.models.spec import Sizes
from dibit.kernels.kv import INT4, INT8, row_width

Stored = tuple[torch.dtype, torch.dtype]
"""Element types of keys and of values (kernels/kv.py)."""

TYPES: dict[KVType, Stored] = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8": (INT8, INT8),
    "k8v4": (INT8, INT4),
    "int4": (INT4, INT4),
}


@dataclass(frozen=True)
class KVCache:
    """k and v of each layer: [blocks, KH, block_size, W], rows as in kernels/kv.py."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @property
    def num_blocks(self) -> int:
        return self.k[0].shape[0]

    @property
    def block_size(self) -> int:
        return self.k[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.k + self.v)


def kv_types(kv_type: KVType, *, quantized: bool) -> Stored:
    """What a setting means: "auto" is float16 under low-bit weights and float32 under floats."""
    if kv_type == "auto":
        return TYPES["float16" if quantized else "float32"]
    return TYPES[kv_type]


def block_bytes(sizes: Sizes, *, block_size: int, stored: Stored) -> int:
    """Of one block over all layers, keys and values. Raises ContractError for a head dim that has no such rows."""
    row = sum(row_width(sizes.head_dim, own) * own.itemsize for own in stored)
    return sizes.layers * sizes.kv_heads * block_size * row


def allocate(
    sizes: Sizes, *, num_blocks: int, block_size: int, stored: Stored, device: torch.device | None = None
) -> KVCache:
    """An empty cache. On the CPU the system backs its pages as they are first written."""

    def empty(dtype: torch.dtype) -> Tensor:
        shape = (num_blocks, sizes.kv_heads, block_size, row_width(sizes.head_dim, dtype))
        if device is not None and device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # torch.zeros writes every page of a cache of which a fraction will be used; numpy asks for zeroed ones.
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)

    def layers(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(empty(dtype) for _ in range(sizes.layers))

    return KVCache(k=layers(stored[0]), v=layers(stored[1]))
