"""The fused ops between products in the interpreter, against the single kernels they stand for.

Both store float16 activations, so an element may differ by one float16 step where float32 sums were added in another
order; the rest is equal, padding and what lies around the residual included.
"""

from __future__ import annotations

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels.formats import Format
from dibit.kernels.triton import fused, layout, small
from dibit.kernels.triton.attention import Attended, attend, paged_attention
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.qlinear import Prepared, Runs, launch_runs, plan_of, prepare, qlinear

FORMATS = (Format(2, 64), Format(3, 128), Format(4, 32), Format(8, -1))


def packed(n: int, k: int, format: Format) -> TritonQWeight:
    scales = torch.rand(n, format.groups(k)).add(0.01).mul(0.05).half()
    return layout.pack(random_weight(n, k, format, scales=scales))


def plain(x: Tensor, w: TritonQWeight) -> Prepared:
    return prepare(x, w, padded_tokens=plan_of(w, x.shape[0]).padded_tokens(x.shape[0]))


def owed(x: Tensor, w: TritonQWeight, bias: Tensor | None) -> Runs:
    runs = launch_runs(plain(x, w), w, plan_of(w, x.shape[0]), bias=bias)
    assert runs.plan.partial == (runs.target.dim() == 3)
    return runs


def assert_same(found: Prepared, want: Prepared) -> None:
    assert found.tokens == want.tokens
    assert torch.equal(found.factors, want.factors)
    torch.testing.assert_close(found.half, want.half, rtol=2.0**-10, atol=2.0**-24)
    assert bool((found.half[found.tokens :] == 0).all()), "padding is not zero"
    torch.testing.assert_close(found.sums, want.sums, rtol=1e-4, atol=32.0)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_norm_of_a_product_still_owed(format: Format) -> None:
    k, width = 128, 1024 if format.bits == 8 else 512
    before, after = packed(k, width, Format(4, -1 if format.bits == 8 else 64)), packed(64, k, format)
    x, bias, norm = torch.randn(3, width), torch.randn(k), torch.rand(k) + 0.5
    runs = owed(x, before, bias)
    assert runs.plan.partial, "runs that are added up already prove nothing"
    guard = torch.full((5, k), 9.0)
    guard[1:4] = torch.randn(3, k)
    residual = guard[1:4]
    want, total = small.add_rms_norm(qlinear(x, before, bias), residual.clone(), norm, 1e-5)
    found = fused.norm_prepared(runs, residual, norm, 1e-5, after)
    assert_same(found, plain(want, after))
    assert torch.equal(residual, total)
    assert bool((guard[0] == 9.0).all())
    assert bool((guard[4] == 9.0).all())


def test_norm_of_a_tensor_alone() -> None:
    w, x, norm = packed(64, 200, Format(4, -1)), torch.randn(9, 200), torch.randn(200)
    assert_same(fused.norm_prepared(x, None, norm, 1e-6, w), plain(small.rms_norm(x, norm, 1e-6), w))


@pytest.mark.parametrize("columns", [96, 256])
def test_silu_of_a_product_still_owed_or_not(columns: int) -> None:
    gate_up, down = packed(2 * columns, 512, Format(4, 64)), packed(64, columns, Format(4, 32))
    x, bias = torch.randn(2, 512), torch.randn(2 * columns)
    runs = owed(x, gate_up, bias)
    assert runs.plan.partial == (columns == 96)
    assert_same(fused.silu_prepared(runs, down), plain(small.silu_mul(qlinear(x, gate_up, bias)), down))


def cache(blocks: int, heads: int, size: int, d: int) -> Tensor:
    return torch.randn(blocks, heads, size, d).half()


@pytest.mark.parametrize("split_keys", [8, 512])
def test_attention_joined_on_its_way(split_keys: int) -> None:
    heads, d, size = 4, 24, 4
    q, keys, values = torch.randn(3, heads * d), cache(9, 2, size, d), cache(9, 2, size, d)
    lengths, starts = torch.tensor([17, 1, 30], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    tables = torch.tensor([[3, 1, 4, 0, 5, 0, 0, 0], [2] + [0] * 7, [8, 7, 6, 5, 4, 3, 2, 1]], dtype=torch.int32)
    w = packed(64, heads * d, Format(4, 32))
    args = (q, keys, values, starts, lengths, tables, d**-0.5)
    attended = attend(*args, split_keys=split_keys)
    assert attended.partial == (split_keys == 8)
    whole = paged_attention(*args, split_keys=split_keys)
    assert_same(fused.attended_prepared(attended, w), plain(whole, w))
    some = torch.tensor([2, 0])
    assert_same(fused.attended_prepared(attended.rows(some), w), plain(whole[some], w))


def test_rope_of_a_product_still_owed() -> None:
    heads, kv_heads, d, size = 3, 1, 16, 4
    w = packed((heads + 2 * kv_heads) * d, 512, Format(4, 64))
    x, bias = torch.randn(4, 512), torch.randn(w.n)
    runs = owed(x, w, bias)
    assert runs.plan.partial
    angles = torch.rand(10, 6) * 6
    positions, slots = torch.tensor([7, 0, 3, 9]), torch.tensor([6, 0, -1, 11])
    found, want = ([torch.full((3, kv_heads, size, d), 7.0) for _ in range(2)] for _ in range(2))
    cos, sin = angles.cos(), angles.sin()
    (k, v), (want_k, want_v) = found, want
    q = small.rope_kv_write(runs, positions, cos, sin, k, v, slots, heads)
    assert torch.equal(q, small.rope_kv_write(qlinear(x, w, bias), positions, cos, sin, want_k, want_v, slots, heads))
    assert torch.equal(k, want_k)
    assert torch.equal(v, want_v)


def test_no_tokens() -> None:
    w = packed(64, 128, Format(4, 64))
    empty = torch.empty(0, 128)
    assert fused.norm_prepared(empty, None, torch.ones(128), 1e-5, w).tokens == 0
    assert fused.attended_prepared(Attended(empty, empty, 0, 1, 16, False), w).tokens == 0
