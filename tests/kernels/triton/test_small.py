"""The small ops in the interpreter, against their references; outputs start poisoned, shapes are ugly."""

from __future__ import annotations

import math

import pytest
import torch

from dibit.kernels.activation import silu_mul_reference
from dibit.kernels.argmax import argmax_reference
from dibit.kernels.contract import ContractError
from dibit.kernels.embedding import embedding_reference
from dibit.kernels.formats import BITS, Format, QTensor
from dibit.kernels.kv import FP8, INT4, INT8, load_rows, row_width
from dibit.kernels.norm import add_rms_norm_reference, rms_norm_reference
from dibit.kernels.rope import rope_kv_write_reference
from dibit.kernels.triton.layout import pack
from dibit.kernels.triton.small import add_rms_norm, argmax, embedding, rms_norm, rope_kv_write, silu_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("t", "k"), [(1, 48), (3, 576), (2, 1000)])
def test_norms(t: int, k: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(t, k).to(dtype), torch.randn(t, k).to(dtype), torch.randn(k)
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), **tolerance)
    want, want_total = add_rms_norm_reference(x, residual.clone(), weight, 1e-5)
    got, total = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(got, want, **tolerance)
    assert torch.equal(total, want_total)


@pytest.mark.parametrize("width", [2, 96, 2050])
def test_silu_mul(width: int) -> None:
    gate_up = torch.randn(3, width) * 5
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_reference(gate_up), rtol=2e-6, atol=1e-6)
    with pytest.raises(ContractError, match="an even number"):
        silu_mul(torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("d", "rotary"), [(16, 16), (24, 24), (32, 8)])
def test_rope_and_the_cache_write(d: int, rotary: int, dtype: torch.dtype) -> None:
    heads, kv_heads, t, block_size = 3, 1, 5, 4
    qkv = torch.randn(t, (heads + 2 * kv_heads) * d)
    positions = torch.tensor([7, 0, 3, 9, 1])
    angles = torch.rand(10, rotary // 2) * 6
    slots = torch.tensor([6, 0, -1, 11, 3])
    caches = [torch.full((3, kv_heads, block_size, d), 7.0, dtype=dtype) for _ in range(4)]
    got = rope_kv_write(qkv, positions, angles.cos(), angles.sin(), caches[0], caches[1], slots, heads)
    want = rope_kv_write_reference(qkv, positions, angles.cos(), angles.sin(), caches[2], caches[3], slots, heads)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    step = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(caches[0], caches[2], rtol=step, atol=step)
    assert torch.equal(caches[1], caches[3])
    assert int((caches[0] == 7.0).all(dim=-1).sum()) == 3 * block_size - 4, "a slot was written that is nobody's"


# The interpreter computes with numpy, which remarks on numbers that are none.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("values", [INT8, INT4], ids=["v8", "v4"])
@pytest.mark.parametrize("keys", [INT8, INT4], ids=["k8", "k4"])
@pytest.mark.parametrize("d", [8, 24, 32, 80])
def test_rows_of_codes_have_the_reference_s_bytes(d: int, keys: torch.dtype, values: torch.dtype) -> None:
    """Nothing is rotated, so that what is stored is the same; of one row a group is not finite, one is zero."""
    heads, kv_heads, t, block_size = 2, 2, 6, 4
    qkv = torch.randn(t, (heads + 2 * kv_heads) * d)
    qkv[1, heads * d + 1] = torch.inf
    qkv[2, -1] = torch.nan
    qkv[3] = 0.0
    qkv[4] *= 1e5
    qkv[5, ::3] = -0.0
    slots = torch.tensor([6, 0, 1, 11, 3, -1])
    none = torch.zeros(1, 0)
    caches = [torch.full((3, kv_heads, block_size, row_width(d, kind)), 7, dtype=kind) for kind in (keys, values) * 2]
    positions = torch.zeros(t, dtype=torch.int64)
    got = rope_kv_write(qkv, positions, none, none, caches[0], caches[1], slots, heads)
    want = rope_kv_write_reference(qkv, positions, none, none, caches[2], caches[3], slots, heads)
    assert torch.equal(got, want)
    for ours, theirs in ((caches[0], caches[2]), (caches[1], caches[3])):
        # NaN of either sign.
        torch.testing.assert_close(load_rows(ours, d), load_rows(theirs, d), rtol=0, atol=0, equal_nan=True)
        finite = load_rows(theirs, d).isfinite().all(dim=-1)
        assert torch.equal(ours[finite], theirs[finite])
    assert int((caches[0] == 7).all(dim=-1).sum()) == kv_heads * (3 * block_size - 5), "a slot that is nobody's"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("d", [8, 13, 80])
def test_fp8_rows_have_the_reference_s_bytes(d: int) -> None:
    """Every number of e4m3, the middle to the next one, a float32 to either side, and what is beyond them all."""
    edges = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    edges = torch.cat([edges, (edges[1:] + edges[:-1]) / 2, torch.tensor([464.0, 480.0, 1e9, 1e-30])])
    edges = torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0)), torch.nextafter(edges, torch.tensor(1e30))])
    values = torch.cat([edges, -edges, torch.tensor([math.nan, -math.nan, math.inf, -math.inf])])
    t = -(-values.numel() // d)
    qkv = torch.zeros(t, 3 * d)
    qkv[:, 2 * d :] = torch.nn.functional.pad(values, (0, t * d - values.numel())).view(t, d)
    none, positions, slots = torch.zeros(1, 0), torch.zeros(t, dtype=torch.int64), torch.randperm(t + 3)[:t]
    caches = [torch.full((1, 1, t + 3, d), 7.0).to(FP8) for _ in range(4)]
    rope_kv_write(qkv, positions, none, none, caches[0], caches[1], slots, 1)
    rope_kv_write_reference(qkv, positions, none, none, caches[2], caches[3], slots, 1)
    for ours, theirs in ((caches[0], caches[2]), (caches[1], caches[3])):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("bits", BITS)
def test_embedding_has_the_reference_s_bits(bits: int, group_size: int) -> None:
    fmt = Format(bits, group_size)
    n, k = 70, 320
    groups = fmt.groups(k)
    w = QTensor(
        codes=torch.randint(0, fmt.qmax + 1, (n, k), dtype=torch.uint8),
        zeros=torch.randint(0, fmt.qmax + 1, (n, groups), dtype=torch.uint8),
        scales=torch.rand(n, groups).add(0.01).half(),
        format=fmt,
    )
    ids = torch.tensor([0, 69, 3, 3, 64])
    packed = pack(w)
    assert torch.equal(embedding(ids, packed), embedding_reference(ids, w))
    y = embedding(torch.tensor([70, 5, -1]), packed)
    assert bool(y[[0, 2]].isnan().all())
    assert torch.equal(y[1:2], embedding_reference(torch.tensor([5]), w))


@pytest.mark.parametrize("v", [1, 100, 4096, 9001])
def test_argmax(v: int) -> None:
    scores = torch.randn(3, v)
    scores[1] = 2.5
    scores[2, v // 2] = math.nan
    ids, peaks = argmax(scores)
    want_ids, want_peaks = argmax_reference(scores)
    assert ids.tolist() == want_ids.tolist()
    torch.testing.assert_close(peaks, want_peaks, rtol=0, atol=0, equal_nan=True)
    low = torch.full((1, v), -math.inf)
    assert argmax(low)[0].tolist() == [0]
