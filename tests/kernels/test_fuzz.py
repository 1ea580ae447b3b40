"""Steps that no scheduler makes: ids, lengths, tables and slots of any value, buffers at odd addresses, and numbers
that are none. Each is refused with nothing written, or computed as the reference does, and nothing else is touched.

`make sanitize` runs this under AddressSanitizer and UBSan, where a read that is out of bounds ends the run.
DIBIT_FUZZ_EXAMPLES sets how many steps each test makes up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dibit.kernels import native
from dibit.kernels.argmax import argmax_reference
from dibit.kernels.argmax_cpu import argmax
from dibit.kernels.attention import paged_attention_reference
from dibit.kernels.attention_cpu import paged_attention
from dibit.kernels.contract import ContractError
from dibit.kernels.embedding_cpu import embedding
from dibit.kernels.formats import BITS, Format, dequantize
from dibit.kernels.kv import FP8, row_width, store_rows
from dibit.kernels.qlinear_cpu import pack, qlinear
from dibit.kernels.rope import rope_kv_write_reference
from dibit.kernels.rope_cpu import rope_kv_write
from dibit.kernels.sampling_cpu import Draws, sample

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")

FUZZ = settings(
    max_examples=int(os.environ.get("DIBIT_FUZZ_EXAMPLES", "40")),
    deadline=None,
    derandomize="DIBIT_FUZZ_EXAMPLES" not in os.environ,
    database=None,
)
GUARD = 7.0
CACHES = (torch.float32, torch.float16, torch.bfloat16, FP8, torch.int8, torch.uint8)
REFUSED = (ContractError, native.NativeError, IndexError)
INT32 = st.one_of(st.integers(-3, 9), st.sampled_from([-(1 << 31), (1 << 31) - 1, 1 << 20]))
INT64 = st.one_of(st.integers(-3, 40), st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 40]))


@pytest.fixture(autouse=True, params=["portable", "avx2", "avx512", "amx"])
def body(request: pytest.FixtureRequest) -> Iterator[None]:
    """On two threads, with each instruction set that the machine has."""
    isa, threads = native.isa(), native.threads()
    try:
        native.set_isa(request.param)
    except native.NativeError:
        pytest.skip(f"no {request.param} on this machine")
    native.set_threads(2)
    yield
    native.set_isa(isa)
    native.set_threads(threads)


def odd_address(x: Tensor) -> Tensor:
    """The same numbers one element further in memory: aligned to an element and to nothing more."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    moved = memory[1:].view(x.shape)
    moved.copy_(x)
    return moved


def guarded(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    memory = torch.full((rows + 2, columns), GUARD)
    memory[1:-1] = float("nan")
    return memory, memory[1:-1]


def untouched(memory: Tensor) -> bool:
    return bool(memory[0].eq(GUARD).all() and memory[-1].eq(GUARD).all())


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@st.composite
def attention_steps(draw: Any) -> dict[str, Any]:
    kv_heads, group, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([8, 20, 64]))
    blocks, block_size, sequences = draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 16])), draw(st.integers(0, 3))
    tokens = draw(st.integers(0, 6))
    valid = draw(st.booleans())
    width = draw(st.integers(1, 4))
    if valid:
        counts = [draw(st.integers(0, 3)) for _ in range(sequences)]
        lengths = [draw(st.integers(min(count, width * block_size), width * block_size)) for count in counts]
        tokens = sum(counts)
        cu = [sum(counts[:i]) for i in range(sequences + 1)]
        table = [[draw(st.integers(0, blocks - 1)) for _ in range(width)] for _ in range(sequences)]
    else:
        cu = [draw(INT32) for _ in range(sequences + 1)]
        lengths = [draw(INT32) for _ in range(sequences)]
        table = [[draw(INT32) for _ in range(width)] for _ in range(sequences)]
    return {
        "shape": (kv_heads, group, d, blocks, block_size, tokens),
        "cu_seqlens": torch.tensor(cu, dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "block_tables": torch.tensor(table, dtype=torch.int32).view(sequences, width),
        "dtype": draw(st.sampled_from(CACHES)),
        "odd": draw(st.booleans()),
        "seed": draw(st.integers(0, 1 << 16)),
    }


@FUZZ
@given(attention_steps())
def test_attention(step: dict[str, Any]) -> None:
    kv_heads, group, d, blocks, block_size, tokens = step["shape"]
    generator = torch.Generator().manual_seed(step["seed"])
    q = torch.randn(tokens, kv_heads * group * d, generator=generator)
    rows = torch.randn(2, blocks, kv_heads, block_size, d, generator=generator)
    k_cache, v_cache = (store_rows(x, step["dtype"]) for x in rows)
    if step["odd"]:
        q, k_cache, v_cache = odd_address(q), odd_address(k_cache), odd_address(v_cache)
    memory, out = guarded(tokens, q.shape[1])
    ints = (step["cu_seqlens"], step["seq_lens"], step["block_tables"])
    try:
        paged_attention(q, k_cache, v_cache, *ints, d**-0.5, out=out)
    except REFUSED:
        assert memory[1:-1].isnan().all(), "refused, and something was written"
    else:
        expected = paged_attention_reference(q, k_cache, v_cache, *ints, d**-0.5)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert untouched(memory)


@st.composite
def cache_writes(draw: Any) -> dict[str, Any]:
    valid, tokens = draw(st.booleans()), draw(st.integers(0, 6))
    blocks, block_size, positions = draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 9))
    slot = st.integers(-1, blocks * block_size - 1) if valid else INT64
    place = st.integers(0, positions - 1) if valid else INT64
    slots = draw(st.lists(slot, min_size=tokens, max_size=tokens, unique=valid and tokens <= blocks * block_size))
    return {
        "shape": (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([8, 20, 64])), tokens),
        "cache": (blocks, block_size),
        "slots": torch.tensor(slots, dtype=torch.int64),
        "positions": torch.tensor([draw(place) for _ in range(tokens)], dtype=torch.int64),
        "table_rows": positions,
        "dtype": draw(st.sampled_from(CACHES)),
        "odd": draw(st.booleans()),
        "bad": draw(st.sampled_from([0.0, 0.0, float("nan"), float("inf"), 1e30])),
        "seed": draw(st.integers(0, 1 << 16)),
    }


@FUZZ
@given(cache_writes())
def test_rope_and_the_cache_write(step: dict[str, Any]) -> None:
    heads, kv_heads, d, tokens = step["shape"]
    blocks, block_size = step["cache"]
    generator = torch.Generator().manual_seed(step["seed"])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d, generator=generator)
    if step["bad"] and tokens:
        qkv[step["seed"] % tokens, step["seed"] % qkv.shape[1]] = step["bad"]
    if step["odd"]:
        qkv = odd_address(qkv)
    angles = torch.randn(step["table_rows"], d // 2, generator=generator)
    dtype = step["dtype"]
    wide = torch.zeros(2, blocks + 2, kv_heads, block_size, row_width(d, dtype), dtype=dtype)
    wide[:, 0] = wide[:, -1] = 7
    k_cache, v_cache = wide[0, 1:-1], wide[1, 1:-1]
    before = wide.clone()
    memory, q = guarded(tokens, heads * d)
    arguments = (qkv, step["positions"], angles.cos(), angles.sin())
    try:
        rope_kv_write(*arguments, k_cache, v_cache, step["slots"], heads, out=q)
    except REFUSED:
        assert torch.equal(bits_of(wide), bits_of(before)), "refused, and something was written"
        assert memory[1:-1].isnan().all()
    else:
        # Of two tokens for one slot either may be kept.
        kept = step["slots"][step["slots"] >= 0]
        if kept.unique().numel() == kept.numel():
            k, v = before[0, 1:-1], before[1, 1:-1]
            expected = rope_kv_write_reference(*arguments, k, v, step["slots"], heads)
            torch.testing.assert_close(q, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
            if not step["bad"]:
                assert torch.equal(bits_of(wide), bits_of(before))
    assert bool(wide[:, 0].eq(7).all() and wide[:, -1].eq(7).all())
    assert untouched(memory)


def weight(bits: int, group_size: int, n: int, k: int, seed: int) -> Any:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    form = Format(bits, group_size)
    return form.encode(w, *form.ranges(w))


@FUZZ
@given(st.sampled_from(BITS), st.integers(1, 70), st.lists(INT64, max_size=6), st.integers(0, 99))
def test_embedding(bits: int, n: int, ids: list[int], seed: int) -> None:
    w = weight(bits, 16, n, 48, seed)
    try:
        found = embedding(torch.tensor(ids, dtype=torch.int64), pack(w))
    except REFUSED:
        assert any(not 0 <= i < n for i in ids)
    else:
        assert torch.equal(found, dequantize(w)[ids] if ids else found)


@FUZZ
@given(
    st.sampled_from(BITS),
    st.sampled_from([16, 32, 64, -1]),
    st.tuples(st.integers(0, 9), st.integers(1, 40), st.sampled_from([64, 128, 192])),
    st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 3e38, 1e-42]),
    st.integers(0, 1 << 16),
)
def test_products(bits: int, group_size: int, shape: tuple[int, int, int], bad: float, seed: int) -> None:
    m, n, k = shape
    packed = pack(weight(bits, group_size, n, k, seed))
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    clean = qlinear(x, packed)
    hit = seed % m if m and bad else -1
    if hit >= 0:
        x[hit, seed % k] = bad
    memory, out = guarded(m, n)
    qlinear(odd_address(x), packed, odd_address(torch.zeros(n)), out=out)
    others = [row for row in range(m) if row != hit]
    assert torch.equal(out[others], clean[others]), "a row reached another, or the address changed a result"
    assert untouched(memory)


SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, float("inf"), -float("inf"), float("nan"), 1e-42])


@FUZZ
@given(st.data(), st.integers(0, 4), st.sampled_from([1, 3, 16, 65]))
def test_argmax_and_draws(data: Any, rows: int, width: int) -> None:
    drawn = data.draw(st.lists(SCORES, min_size=rows * width, max_size=rows * width))
    scores = odd_address(torch.tensor(drawn).view(rows, width))
    best, peaks = argmax(scores)
    expected, _ = argmax_reference(scores)
    assert torch.equal(best, expected)
    draws = Draws(4)
    number = st.one_of(st.floats(width=64), st.sampled_from([0.0, 1.0, 1e-300, 1e300]))
    for row in range(rows):
        draws.draw(
            row,
            temperature=data.draw(number),
            min_p=data.draw(number),
            top_k=data.draw(st.integers(-(1 << 40), 1 << 40)),
            top_p=data.draw(number),
            seed=data.draw(st.integers(0, (1 << 128) - 1)),
        )
    ids = sample(scores, best, peaks, draws)
    assert bool(((ids >= 0) & (ids < width)).all())
