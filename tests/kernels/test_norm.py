"""RMS normalization: the C++ body against float64, its independence of the step, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit.kernels import native
from dibit.kernels.contract import ContractError
from dibit.kernels.norm import add_rms_norm_reference, head_norm_reference, rms_norm_reference
from dibit.kernels.norm_cpu import add_rms_norm, head_norm, rms_norm

NAN = float("nan")
EPS = 1e-5


def exact(x: Tensor, weight: Tensor) -> Tensor:
    h = x.double()
    return h * (h.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def assert_rows(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """The squares, all positive, are summed in chains of K / 32 + 8 roundings at most; the root halves their error."""
    bound = (x.shape[1] / 64 + 8) * 2.0**-24
    expected = exact(x, weight)
    assert ((y.double() - expected).abs() <= bound * expected.abs()).all()


def guarded(rows: int, k: int) -> tuple[Tensor, Tensor]:
    memory = torch.full((rows + 2, k), NAN)
    memory[0] = memory[-1] = 7.0
    return memory, memory[1:-1]


SHAPES = [(1, 576), (3, 1), (7, 33), (5, 32), (64, 1536), (129, 257), (0, 64)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_rms_norm(isa: str, rows: int, k: int, threads: int) -> None:
    native.set_threads(threads)
    x, weight = torch.randn(rows, k) * 3, torch.randn(k)
    memory, out = guarded(rows, k)
    assert rms_norm(x, weight, EPS, out=out) is out
    assert_rows(out, x, weight)
    assert memory[0].eq(7.0).all()
    assert memory[-1].eq(7.0).all()
    torch.testing.assert_close(out, rms_norm_reference(x, weight, EPS))
    assert torch.equal(rms_norm(x, weight, EPS), out)
    assert torch.equal(rms_norm(x, weight, EPS, out=x), out)


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_add_rms_norm(isa: str, rows: int, k: int) -> None:
    x, residual, weight = torch.randn(rows, k), torch.randn(rows, k), torch.randn(k)
    expected, total = add_rms_norm_reference(x, residual, weight, EPS)
    memory, kept = guarded(rows, k)
    kept.copy_(residual)
    y, summed = add_rms_norm(x, kept, weight, EPS)
    assert summed is kept
    assert torch.equal(summed, total)
    assert memory[0].eq(7.0).all()
    assert memory[-1].eq(7.0).all()
    assert_rows(y, total, weight)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y, rms_norm(total, weight, EPS))


def test_a_row_alone_gives_the_same_bits(isa: str) -> None:
    x, weight = torch.randn(200, 577), torch.randn(577)
    native.set_threads(3)
    together = rms_norm(x, weight, EPS)
    native.set_threads(1)
    assert torch.equal(together, torch.cat([rms_norm(row[None], weight, EPS) for row in x]))


@pytest.mark.parametrize("value", [NAN, torch.inf])
def test_nan_and_infinity_stay_in_their_row(isa: str, value: float) -> None:
    x, weight = torch.randn(3, 41), torch.randn(41)
    clean = rms_norm(x, weight, EPS)
    for column in (0, 31, 40):
        dirty = x.clone()
        dirty[1, column] = value
        y = rms_norm(dirty, weight, EPS)
        assert y[1, column].isnan()
        assert torch.equal(y.isnan(), rms_norm_reference(dirty, weight, EPS).isnan())
        assert torch.equal(y[::2], clean[::2])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("t", "heads", "kv_heads", "d"), [(1, 9, 3, 64), (7, 2, 2, 6), (70, 4, 1, 128), (0, 1, 1, 8)])
def test_head_norm(isa: str, t: int, heads: int, kv_heads: int, d: int, threads: int) -> None:
    native.set_threads(threads)
    memory, qkv = guarded(t, (heads + 2 * kv_heads) * d)
    qkv.copy_(torch.randn(qkv.shape) * 3)
    q_norm, k_norm, values = torch.randn(d), torch.randn(d), qkv[:, (heads + kv_heads) * d :].clone()
    expected = head_norm_reference(qkv, q_norm, k_norm, heads, EPS)
    single = torch.cat([head_norm(row[None].clone(), q_norm, k_norm, heads, EPS) for row in qkv] or [expected])
    y = head_norm(qkv, q_norm, k_norm, heads, EPS)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y, single), "a token's bits depend on the step"
    assert torch.equal(y[:, (heads + kv_heads) * d :], values)
    assert memory[0].eq(7.0).all()
    assert memory[-1].eq(7.0).all()


def test_head_norm_refuses() -> None:
    qkv, norm = torch.randn(2, 40), torch.ones(8)
    for bad in (qkv.double(), qkv[:, ::2], torch.randn(2, 32), torch.randn(2, 24)):
        with pytest.raises(ContractError, match="head_norm"):
            head_norm(bad, norm, norm, 3, EPS)
    with pytest.raises(ContractError, match="k_norm"):
        head_norm(qkv, norm, norm[:4], 3, EPS)


def test_a_row_of_zeros_is_zero(isa: str) -> None:
    assert rms_norm(torch.zeros(2, 9), torch.ones(9), EPS).eq(0).all()


def test_wrong_tensors_are_refused() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    for bad in (x.double(), x.half(), x[0], x[:, ::2], x[:, :7].contiguous()):
        with pytest.raises(ContractError, match="rms_norm"):
            rms_norm(bad, weight, EPS)
    for bad in (weight.double(), weight[:7], torch.ones(16)[::2]):
        with pytest.raises(ContractError, match="weight"):
            rms_norm(x, bad, EPS)
    for bad in (x.double(), x[:2], torch.randn(3, 16)[:, ::2]):
        with pytest.raises(ContractError, match="residual"):
            add_rms_norm(x, bad, weight, EPS)
        with pytest.raises(ContractError, match="out"):
            rms_norm(x, weight, EPS, out=bad)
