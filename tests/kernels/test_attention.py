"""Paged attention: the reference against torch's dense attention, the C++ body against float64, and its invariances."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dibit.kernels import native
from dibit.kernels.attention import paged_attention_reference
from dibit.kernels.attention_cpu import paged_attention
from dibit.kernels.contract import ContractError
from dibit.kernels.kv import CODES, FP8, load_rows, row_width, store_rows

NAN = float("nan")
Stored = torch.dtype | tuple[torch.dtype, torch.dtype]
"""Of keys and values."""
ROUND = 2.0**-24  # half an ulp of 1 in float32


@dataclass(frozen=True)
class Sequences:
    """Dense q [n, H, D] for the last n positions, k and v [L, KH, D] of each sequence."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    def pick(self, *which: int) -> Sequences:
        return Sequences([self.q[i] for i in which], [self.k[i] for i in which], [self.v[i] for i in which])

    def chunk(self, start: int, stop: int) -> Sequences:
        """Tokens [start, stop) of the only sequence, with the keys they may see."""
        past = self.k[0].shape[0] - self.q[0].shape[0]
        return Sequences([self.q[0][start:stop]], [self.k[0][: past + stop]], [self.v[0][: past + stop]])


def sequences(
    lengths: list[int], tokens: list[int], heads: int, kv_heads: int, d: int, *, seed: int = 0, spread: float = 1.0
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Sequences(
        [draw(n, heads, d) * spread for n in tokens],
        [draw(length, kv_heads, d) for length in lengths],
        [draw(length, kv_heads, d) for length in lengths],
    )


@dataclass(frozen=True)
class Step:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    scale: float


def types_of(stored: Stored) -> tuple[torch.dtype, torch.dtype]:
    return stored if isinstance(stored, tuple) else (stored, stored)


def poisoned_cache(*shape: int, d: int, dtype: torch.dtype) -> Tensor:
    cache = torch.empty(*shape, row_width(d, dtype), dtype=dtype)
    # 0x7f7f is NaN in float16, as the scales of codes.
    return cache.fill_(NAN if dtype.is_floating_point else 0x7F)


def paged(sequences: Sequences, block_size: int, dtype: Stored = torch.float32, *, seed: int = 0) -> Step:
    """The sequences in scattered blocks; every slot that no key owns is NaN, every table entry past an end is wild."""
    lengths = [k.shape[0] for k in sequences.k]
    needed = [-(-length // block_size) for length in lengths]
    _, kv_heads, d = sequences.k[0].shape
    blocks = sum(needed) + 3
    k_cache, v_cache = (poisoned_cache(blocks, kv_heads, block_size, d=d, dtype=own) for own in types_of(dtype))
    free = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(lengths), max(needed) + 2), 1 << 30, dtype=torch.int32)
    for b, length in enumerate(lengths):
        own = [free.pop() for _ in range(needed[b])]
        tables[b, : needed[b]] = torch.tensor(own, dtype=torch.int32)
        block = torch.tensor(own).repeat_interleave(block_size)[:length]
        offset = torch.arange(length) % block_size
        k_cache[block, :, offset] = store_rows(sequences.k[b], k_cache.dtype)
        v_cache[block, :, offset] = store_rows(sequences.v[b], v_cache.dtype)
    counts = torch.tensor([0] + [q.shape[0] for q in sequences.q])
    return Step(
        torch.cat(sequences.q).flatten(1),
        k_cache,
        v_cache,
        counts.cumsum(0).int(),
        torch.tensor(lengths, dtype=torch.int32),
        tables[:, :-1],
        d**-0.5,
    )


def run(step: Step) -> Tensor:
    """The C++ body into a poisoned output between guard rows."""
    memory = torch.full((step.q.shape[0] + 2, step.q.shape[1]), NAN)
    memory[0] = memory[-1] = 7.0
    out = memory[1:-1]
    assert paged_attention(*vars(step).values(), out=out) is out
    assert memory[0].eq(7.0).all()
    assert memory[-1].eq(7.0).all()
    return out


def exact(sequences: Sequences, dtype: Stored) -> tuple[Tensor, Tensor]:
    """The float64 result over the stored keys and values, and a bound on a float32 computation's error.

    A score is a sum of D products, wrong by at most (D + 3) roundings of the sum of their magnitudes; a change e of the
    scores changes a weight by the factor exp(2 e); exp adds 2e-7 and the sums over keys one rounding a key.
    """
    outs, bounds = [], []
    for q, k, v in zip(sequences.q, sequences.k, sequences.v, strict=True):
        (n, heads, d), length = q.shape, k.shape[0]
        repeat = heads // k.shape[1]
        q64 = q.double().transpose(0, 1)
        stored = zip((k, v), types_of(dtype), strict=True)
        k64, v64 = (
            load_rows(store_rows(x, own), d).double().repeat_interleave(repeat, 1).transpose(0, 1) for x, own in stored
        )
        hidden = torch.ones(n, length).triu(length - n + 1).bool()
        scores = (q64 @ k64.transpose(1, 2) * d**-0.5).masked_fill(hidden, -torch.inf)
        magnitude = (q64.abs() @ k64.abs().transpose(1, 2) * d**-0.5).masked_fill(hidden, 0)
        weights = scores.softmax(-1)
        error = 2 * (d + 3) * ROUND * magnitude.amax(-1, keepdim=True) + (length + 8) * ROUND + 4e-7
        outs.append((weights @ v64).transpose(0, 1).flatten(1))
        bounds.append((error * (weights @ v64.abs())).transpose(0, 1).flatten(1))
    return torch.cat(outs), torch.cat(bounds)


def assert_exact(out: Tensor, data: Sequences, dtype: Stored = torch.float32) -> None:
    expected, bound = exact(data, dtype)
    excess = ((out.double() - expected).abs() - bound).max()
    assert excess <= 0, f"error exceeds the bound by {excess:.2e}"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_reference_is_torchs_attention(heads: int, kv_heads: int) -> None:
    data = sequences([19, 8], [19, 3], heads, kv_heads, 16)
    out = paged_attention_reference(*vars(paged(data, 4)).values())
    start = 0
    for q, k, v in zip(data.q, data.k, data.v, strict=True):
        n, length = q.shape[0], k.shape[0]
        mask = torch.ones(n, length).tril(length - n).bool()
        k, v = (x.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for x in (k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=mask)
        torch.testing.assert_close(out[start : start + n], dense.transpose(0, 1).flatten(1))
        start += n


GEOMETRIES = [  # heads, kv_heads, d, block_size
    (4, 4, 64, 16),
    (9, 3, 64, 16),
    (8, 2, 20, 7),
    (7, 1, 5, 1),
    (50, 1, 24, 3),
    (4, 2, 128, 300),
    (14, 2, 80, 32),
    (2, 1, 200, 5),
]


def skip_odd_codes(d: int, stored: Stored) -> None:
    if d % 2 and any(own in CODES for own in types_of(stored)):
        pytest.skip("codes of an odd head dim are refused")


DTYPES: list[Stored] = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    FP8,
    torch.int8,
    torch.uint8,
    (torch.int8, torch.uint8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mixed_prefill_and_decode(isa: str, geometry: tuple[int, int, int, int], dtype: Stored) -> None:
    heads, kv_heads, d, block_size = geometry
    skip_odd_codes(d, dtype)
    data = sequences([1, 300, 33, 97, 32, 257], [1, 1, 33, 40, 1, 2], heads, kv_heads, d)
    assert_exact(run(paged(data, block_size, dtype)), data, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_context_is_cut_and_merged(isa: str, threads: int) -> None:
    native.set_threads(threads)
    data = sequences([2100], [1], 6, 2, 64, spread=4.0)
    assert_exact(run(paged(data, 16)), data)


def test_sharp_and_flat_softmax(isa: str) -> None:
    for spread in (0.0, 30.0, 1000.0):
        data = sequences([700], [9], 2, 1, 32, spread=spread)
        assert_exact(run(paged(data, 16)), data)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    step = paged(sequences([1200, 40, 700], [1, 40, 300], 6, 2, 40), 16, torch.float16)
    results = []
    for threads in (1, 2, 3):
        native.set_threads(threads)
        results += [run(step), run(step)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_sequence_alone_gives_the_same_bits(isa: str) -> None:
    native.set_threads(2)
    data = sequences([600, 5, 33, 1, 290], [1, 5, 20, 1, 290], 4, 4, 24)
    together = run(paged(data, 16))
    start = 0
    for i, q in enumerate(data.q):
        stop = start + q.shape[0]
        assert torch.equal(run(paged(data.pick(i), 16, seed=i + 1)), together[start:stop])
        start = stop


@pytest.mark.parametrize("chunk", [1, 2, 37, 256, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype"),
    # Up to nine rows a token meet the register tiles in every way and rows across lanes; 20 is no multiple of 8, 24 and
    # 80 are none of 64, so that the cache is read through floats, in place, and in place with every kind of remainder.
    [
        (2, 2, 20, torch.float32),
        (4, 2, 20, torch.float16),
        (4, 1, 20, torch.bfloat16),
        (7, 1, 20, torch.float32),
        (2, 2, 24, torch.float16),
        (6, 2, 80, torch.float16),
        (5, 1, 80, torch.bfloat16),
        (6, 1, 64, torch.float16),
        (9, 1, 8, torch.float16),
        (6, 2, 80, FP8),
        (4, 2, 20, FP8),
        (6, 2, 80, torch.int8),
        (5, 1, 64, torch.uint8),
        (4, 2, 20, (torch.int8, torch.uint8)),
    ],
)
def test_chunks_blocks_and_threads_leave_no_trace(
    isa: str, heads: int, kv_heads: int, d: int, dtype: Stored, chunk: int
) -> None:
    data = sequences([590], [590], heads, kv_heads, d)
    native.set_threads(1)
    whole = run(paged(data, 16, dtype))
    native.set_threads(3)
    starts = range(0, 590, chunk) if chunk > 2 else (0, 31, 32, 255, 256, 588)
    for i, start in enumerate(starts):
        stop = min(start + chunk, 590)
        part = run(paged(data.chunk(start, stop), (16, 7, 64)[i % 3], dtype, seed=i))
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_both_avx_bodies_give_the_same_bits(
    isas: tuple[str, ...], geometry: tuple[int, int, int, int], dtype: Stored
) -> None:
    if "avx512" not in isas:
        pytest.skip("no avx512 on this machine")
    heads, kv_heads, d, block_size = geometry
    skip_odd_codes(d, dtype)
    step = paged(sequences([1, 300, 33, 97, 290], [1, 1, 33, 40, 3], heads, kv_heads, d), block_size, dtype)
    results = []
    for name in ("avx2", "avx512"):
        native.set_isa(name)
        results.append(run(step))
    assert torch.equal(*results)


@pytest.mark.parametrize("heads", [1, 3, 60])
def test_every_byte_of_fp8(isa: str, heads: int) -> None:
    """One key weighs 1, so that the result is its value: read in place, through floats, and by rows across lanes."""
    stored = torch.arange(256, dtype=torch.uint8)
    for d in (256, 255):
        values = stored[-d:].view(FP8)
        only = torch.tensor([1], dtype=torch.int32)
        start, table = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
        v_cache, q = values.view(1, 1, 1, d), torch.zeros(1, heads * d)
        step = Step(q, torch.zeros(v_cache.shape).to(FP8), v_cache, start, only, table, 1.0)
        found, wanted = run(step).view(heads, d), load_rows(values, d).expand(heads, d)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_nan_reaches_what_uses_it_and_nothing_else(isa: str) -> None:
    # Two heads share a key head, so that the register tiles of three rows straddle the causal edge.
    lengths, tokens, heads, kv_heads, d = [40, 300], [40, 60], 4, 2, 20
    clean = sequences(lengths, tokens, heads, kv_heads, d)
    expected = run(paged(clean, 16)).view(100, heads, d)

    def poisoned(which: str, b: int, *index: int) -> Tensor:
        tensors = [x.clone() for x in getattr(clean, which)]
        tensors[b][index] = NAN
        return run(paged(replace(clean, **{which: tensors}), 16)).view(100, heads, d)

    touched = torch.zeros(100, heads, d, dtype=torch.bool)

    def check(out: Tensor, where: tuple[int | slice, ...]) -> None:
        hit = touched.clone()
        hit[where] = True
        assert out[hit].isnan().all()
        assert torch.equal(out[~hit], expected[~hit])

    check(poisoned("q", 0, 7, 3, 3), (7, 3))
    for key in (0, 17, 33, 39):
        check(poisoned("k", 0, key, 1, 19), (slice(key, 40), slice(2, 4)))
        check(poisoned("v", 0, key, 0, 5), (slice(key, 40), slice(0, 2), 5))
    for key in (0, 255, 256, 299):  # sequence 1 holds rows 40 ... 99, at positions 240 ... 299
        check(poisoned("k", 1, key, 0, 0), (slice(40 + max(0, key - 240), 100), slice(0, 2)))
        check(poisoned("v", 1, key, 1, 7), (slice(40 + max(0, key - 240), 100), slice(2, 4), 7))


def test_a_score_of_minus_infinity_weighs_nothing(isa: str) -> None:
    data = sequences([70], [1], 1, 1, 8)
    data.q[0][...] = 1.0
    data.k[0][:34, 0, 2] = -torch.inf  # the whole first tile of keys among them
    expected, _ = exact(Sequences(data.q, [data.k[0][34:]], [data.v[0][34:]]), torch.float32)
    torch.testing.assert_close(run(paged(data, 16)).double(), expected, rtol=1e-5, atol=1e-6)
    data.k[0][..., 2] = -torch.inf
    assert run(paged(data, 16)).isnan().all()


def test_no_tokens(isa: str) -> None:
    step = paged(sequences([5], [0], 2, 1, 8), 4)
    assert run(step).shape == (0, 16)
    nobody = replace(
        step, cu_seqlens=step.cu_seqlens[:1], seq_lens=step.seq_lens[:0], block_tables=step.block_tables[:0]
    )
    assert run(nobody).shape == (0, 16)


def test_an_idle_sequence_is_not_read(isa: str) -> None:
    data = sequences([5, 9, 6], [1, 0, 2], 2, 1, 8)
    step = paged(data, 4)
    step.block_tables[1] = -1
    assert_exact(run(step), data.pick(0, 2))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_what_would_read_outside_the_cache_is_refused(isa: str) -> None:
    step = paged(sequences([9, 6], [1, 2], 2, 1, 8), 4)
    blocks = step.k_cache.shape[0]
    capacity = step.block_tables.shape[1] * 4
    wild = step.block_tables.clone()
    wild[1, 1] = blocks
    negative = step.block_tables.clone()
    negative[0, 2] = -1
    cases = {
        f"0 to {blocks - 1}": [replace(step, block_tables=wild), replace(step, block_tables=negative)],
        "seq_lens": [
            replace(step, seq_lens=ints(9, capacity + 1)),
            replace(step, seq_lens=ints(9, 1)),
            replace(step, seq_lens=ints(-1, 6)),
        ],
        "cu_seqlens": [
            replace(step, cu_seqlens=ints(0, 1, 4)),
            replace(step, cu_seqlens=ints(1, 1, 3)),
            replace(step, cu_seqlens=ints(0, 4, 3)),
        ],
    }
    for message, steps in cases.items():
        for bad in steps:
            out = torch.full_like(step.q, NAN)
            with pytest.raises(native.NativeError, match=message):
                paged_attention(*vars(bad).values(), out=out)
            assert out.isnan().all()


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    step = paged(sequences([9, 6], [1, 2], 2, 1, 8), 4)
    bad = [
        replace(step, q=step.q.double()),
        replace(step, q=step.q.repeat(1, 2)[:, ::2]),
        replace(step, q=step.q[:, :12].contiguous()),
        replace(step, q=step.q[:, :0].contiguous().new_zeros(3, 20)),
        replace(step, k_cache=step.k_cache.half()),
        replace(step, v_cache=step.v_cache.to(torch.int8)),
        replace(step, k_cache=step.k_cache.to(torch.int8), v_cache=step.v_cache.to(torch.int8)),
        replace(step, v_cache=step.v_cache[:-1]),
        replace(step, k_cache=step.k_cache.transpose(0, 2)),
        replace(step, seq_lens=step.seq_lens.long()),
        replace(step, cu_seqlens=step.cu_seqlens[:2]),
        replace(step, block_tables=step.block_tables[:1]),
        replace(step, block_tables=step.block_tables.T.contiguous().T),
    ]
    for case in bad:
        with pytest.raises(ContractError, match="paged_attention"):
            paged_attention(*vars(case).values())
    with pytest.raises(ContractError, match="out"):
        paged_attention(*vars(step).values(), out=step.q[:-1])
