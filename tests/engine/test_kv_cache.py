"""Memory of the paged cache on the CPU."""

import psutil
import pytest

from dibit.engine.kv_cache import TYPES, allocate
from dibit.engine.models.rope import Rope
from dibit.engine.models.spec import Sizes

# The shape of SmolLM2-135M.
SIZES = Sizes(
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    max_positions=8192,
    norm_eps=1e-5,
    tied_head=True,
    rope=Rope(theta=1e5, dim=64),
)


def test_pages_exist_once_they_are_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = allocate(SIZES, num_blocks=2000, block_size=16, stored=TYPES["float16"])
    assert cache.nbytes > 7e8
    for tensor in cache.k + cache.v:
        tensor[0] = 1.0
    # 370 KB in small pages; in huge ones 120 MB.
    assert process.memory_info().rss - before < 8e6
    assert not any(bool(tensor[-1].any()) for tensor in cache.k + cache.v)


def test_no_room_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="KV cache"):
        allocate(SIZES, num_blocks=1 << 38, block_size=16, stored=TYPES["float16"])
