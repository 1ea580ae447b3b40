"""The keys and values of every layer, in blocks that the scheduler hands out.

Which sequence owns a block is the scheduler's knowledge alone; here a block is an index.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dibit.engine.config import KVType
from dibit.engine.models.spec import Sizes
from dibit.kernels.kv import FP8, INT4, INT8, row_width

Stored = tuple[torch.dtype, torch.dtype]
"""Element types of keys and of values (kernels/kv.py)."""

TYPES: dict[KVType, Stored] = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "fp8": (FP8, FP8),
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


def _zeros(nbytes: int) -> Tensor:
    """uint8 [nbytes] on the CPU whose pages exist once they are written (torch.zeros writes them all).

    The pages are small ones. Huge ones, which numpy asks for, spare attention 4 % of its time over long contexts; but
    a block spans the keys and values of all layers, so that all of them reach their next page in one step. Clearing
    60 of them took 0.3 s on a virtual machine, and the first ones 100 MB for the shortest of conversations.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8))
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {nbytes} bytes of KV cache") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def allocate(
    sizes: Sizes, *, num_blocks: int, block_size: int, stored: Stored, device: torch.device | None = None
) -> KVCache:
    """An empty cache. On the CPU the system backs its pages as they are first written."""

    def empty(dtype: torch.dtype) -> Tensor:
        shape = (num_blocks, sizes.kv_heads, block_size, row_width(sizes.head_dim, dtype))
        if device is not None and device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return _zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def layers(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(empty(dtype) for _ in range(sizes.layers))

    return KVCache(k=layers(stored[0]), v=layers(stored[1]))
