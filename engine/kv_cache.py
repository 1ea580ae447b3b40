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

DTYPES: dict[KVType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class KVCache:
    """k and v of each layer: [blocks, KH, block_size, D]."""

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


def kv_dtype(kv_type: KVType, *, quantized: bool) -> torch.dtype:
    """The element type that a setting means: "auto" is float16 under low-bit weights and float32 under floats."""
    if kv_type == "auto":
        return torch.float16 if quantized else torch.float32
    return DTYPES[kv_type]


def block_bytes(sizes: Sizes, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * sizes.layers * sizes.kv_width * block_size * dtype.itemsize


def allocate(
    sizes: Sizes, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | None = None
) -> KVCache:
    """An empty cache. On the CPU the system backs its pages as they are first written."""
    shape = (num_blocks, sizes.kv_heads, block_size, sizes.head_dim)

    def empty() -> Tensor:
        if device is not None and device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # torch.zeros writes every page of a cache of which a fraction will be used; numpy asks for zeroed ones.
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)

    def layers() -> tuple[Tensor, ...]:
        return tuple(empty() for _ in range(sizes.layers))

    return KVCache(k=layers(), v=layers())
