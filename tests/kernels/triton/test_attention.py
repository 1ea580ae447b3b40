"""Paged attention in the interpreter: against the reference in float64, over splits, chunks and ugly head counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit.kernels.attention import paged_attention_reference
from dibit.kernels.contract import ContractError
from dibit.kernels.kv import FP8, INT4, INT8, REALS, load_rows, row_width, store_rows
from dibit.kernels.triton.attention import paged_attention
from dibit.kernels.triton.limits import SIDE_BY_SIDE_TOKENS

NAN = float("nan")
BLOCK_SIZE = 8


class Case:
    """Sequences of given lengths, the last `tokens` of each asked for; slots that no key owns are NaN, table entries
    past an end are wild."""

    def __init__(
        self,
        lengths: list[int],
        tokens: list[int],
        heads: int,
        kv_heads: int,
        d: int,
        dtype: torch.dtype,
        values: torch.dtype | None = None,
    ) -> None:
        needed = [-(-length // BLOCK_SIZE) for length in lengths]
        blocks = sum(needed) + 2
        order = torch.randperm(blocks).to(torch.int32)
        self.d = d
        self.k_cache, self.v_cache = (
            # All bits set: the scales of codes are NaN too.
            torch.full((blocks, kv_heads, BLOCK_SIZE, row_width(d, kind) * kind.itemsize), 255, dtype=torch.uint8)
            .view(kind)
            .clone()
            for kind in (dtype, values or dtype)
        )
        self.tables = torch.full((len(lengths), max(needed) + 1), 1 << 30, dtype=torch.int32)
        for b, length in enumerate(lengths):
            own = order[sum(needed[:b]) : sum(needed[: b + 1])]
            self.tables[b, : needed[b]] = own
            for position in range(length):
                block, offset = int(own[position // BLOCK_SIZE]), position % BLOCK_SIZE
                for cache in (self.k_cache, self.v_cache):
                    cache[block, :, offset] = store_rows(torch.randn(kv_heads, d), cache.dtype)
        self.q = torch.randn(sum(tokens), heads * d)
        self.cu_seqlens = torch.tensor([0, *torch.tensor(tokens).cumsum(0)], dtype=torch.int32)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.scale = d**-0.5

    def run(self, **options: int) -> Tensor:
        whole = torch.full((self.q.shape[0] + 2, self.q.shape[1]), 1e30)
        out = whole[1:-1]
        got = paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.cu_seqlens,
            self.seq_lens,
            self.tables,
            self.scale,
            out=out,
            **options,
        )
        assert got is out
        assert bool((whole[0] == 1e30).all()), "a row before the output was written"
        assert bool((whole[-1] == 1e30).all()), "a row after the output was written"
        return got

    def want(self) -> Tensor:
        """In float64, the queries, and what codes stand for, rounded as the kernel rounds them."""
        d = self.d
        kind = self.k_cache.dtype if self.k_cache.dtype in REALS else torch.float16
        q = self.q.to(kind).double()
        keys, values = (load_rows(cache, d).to(kind).double() for cache in (self.k_cache, self.v_cache))
        out = torch.empty_like(q)
        heads = q.shape[1] // d
        for b in range(self.seq_lens.shape[0]):
            start, stop, length = int(self.cu_seqlens[b]), int(self.cu_seqlens[b + 1]), int(self.seq_lens[b])
            table = self.tables[b, : -(-length // BLOCK_SIZE)].long()
            k, v = (c[table].transpose(0, 1).reshape(keys.shape[1], -1, d)[:, :length] for c in (keys, values))
            repeat = heads // keys.shape[1]
            k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
            scores = q[start:stop].view(-1, heads, d).transpose(0, 1) @ k.transpose(1, 2) * self.scale
            mask = torch.ones(stop - start, length, dtype=torch.bool).tril(length - (stop - start))
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            out[start:stop] = (weights @ v).transpose(0, 1).reshape(stop - start, -1)
        return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype"),
    [(4, 4, 16, torch.float32), (6, 2, 24, torch.float16), (9, 1, 32, torch.float16)],
    ids=["mha-fp32", "gqa-fp16", "mqa-fp16"],
)
def test_decode_and_chunks_of_one_step(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    case = Case([1, 37, 21, 64], [1, 1, 21, 3], heads, kv_heads, d, dtype)
    got, want = case.run(split_keys=32), case.want()
    # float32 sums; under a float16 cache the weights of the values are rounded to 11 bits as well.
    limit = 2e-5 if dtype == torch.float32 else 2.0**-10 * float(case.v_cache.nan_to_num().abs().max())
    assert bool(((got.double() - want).abs() <= limit).all())


@pytest.mark.parametrize(
    ("keys", "values"),
    [(INT8, INT8), (INT8, INT4), (INT4, INT8), (INT4, INT4), (FP8, FP8)],
    ids=["int8", "k8v4", "k4v8", "int4", "fp8"],
)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 32), (6, 2, 24), (2, 1, 80)])
def test_caches_of_low_bits(heads: int, kv_heads: int, d: int, keys: torch.dtype, values: torch.dtype) -> None:
    """Decoding, chunks, and one chunk of more tokens than are done side by side."""
    n = SIDE_BY_SIDE_TOKENS + 5
    for lengths, tokens in (([1, 37, 64], [1, 1, 3]), ([n], [n])):
        case = Case(lengths, tokens, heads, kv_heads, d, keys, values)
        got, want = case.run(split_keys=32), case.want()
        limit = 2.0**-10 * float(load_rows(case.v_cache, d).nan_to_num().abs().max())
        assert bool(((got.double() - want).abs() <= limit).all())


def test_every_byte_of_fp8() -> None:
    """One key weighs 1, so that the result is its value."""
    case = Case([1], [1], 2, 2, 128, FP8)
    case.v_cache[:, 0] = torch.arange(128, dtype=torch.uint8).view(FP8)
    case.v_cache[:, 1] = torch.arange(128, 256).to(torch.uint8).view(FP8)
    wanted = torch.arange(256).to(torch.uint8).view(FP8).float()
    torch.testing.assert_close(case.run()[0], wanted, rtol=0, atol=0, equal_nan=True)


def test_an_odd_head_dim_in_fp8() -> None:
    case = Case([8, 19], [1, 2], 2, 1, 13, FP8)
    limit = 2.0**-10 * float(load_rows(case.v_cache, 13).nan_to_num().abs().max())
    assert bool(((case.run().double() - case.want()).abs() <= limit).all())


def test_rows_of_codes_at_odd_bytes_are_refused() -> None:
    case = Case([8], [1], 2, 1, 26, INT8, INT4)
    with pytest.raises(ContractError, match="v_cache has rows of 4-bit codes of a head dim of 26"):
        case.run()


def test_agrees_with_the_reference() -> None:
    case = Case([30, 5], [4, 1], 4, 2, 16, torch.float32)
    want = paged_attention_reference(
        case.q, case.k_cache, case.v_cache, case.cu_seqlens, case.seq_lens, case.tables, case.scale
    )
    torch.testing.assert_close(case.run(), want)


def test_splits_side_by_side_and_one_after_another_agree() -> None:
    """More tokens than SIDE_BY_SIDE_TOKENS are one program each, with the splits inside."""
    n = SIDE_BY_SIDE_TOKENS + 3
    case = Case([n], [n], 2, 1, 16, torch.float16)
    together = case.run(split_keys=32)
    limit = 2.0**-10 * float(case.v_cache.nan_to_num().abs().max())
    assert bool(((together.double() - case.want()).abs() <= limit).all())
    case.q, case.cu_seqlens = case.q[-2:].contiguous(), torch.tensor([0, 2], dtype=torch.int32)
    torch.testing.assert_close(case.run(split_keys=32), together[-2:], rtol=0, atol=2e-6)


def test_a_sequence_does_not_depend_on_its_company() -> None:
    case = Case([40, 3], [1, 1], 4, 2, 16, torch.float16)
    together = case.run(split_keys=32)
    for b in range(2):
        alone = paged_attention(
            case.q[b : b + 1].contiguous(),
            case.k_cache,
            case.v_cache,
            torch.tensor([0, 1], dtype=torch.int32),
            case.seq_lens[b : b + 1],
            case.tables[b : b + 1],
            case.scale,
            split_keys=32,
        )
        assert torch.equal(alone, together[b : b + 1])


def test_shapes_are_checked() -> None:
    case = Case([8], [1], 4, 2, 16, torch.float16)
    case.q = torch.zeros(1, 3 * 16)
    with pytest.raises(ContractError, match="q has 48 columns; expected a multiple of KH"):
        case.run()
