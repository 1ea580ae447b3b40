"""The quantized linear: reference against the formula, C++ against the reference and against its own definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels import native, qlinear_cpu
from dibit.kernels.contract import ContractError
from dibit.kernels.formats import BITS, Format, FormatError, QTensor, dequantize
from dibit.kernels.qlinear import qlinear_reference

EPS = torch.finfo(torch.float32).eps
POISON = 1.0e30

# Group size and the K that go with it: one group, an odd number of groups, more than one chunk of 1024 columns.
COLUMNS = {
    16: (16, 48, 1040),
    32: (32, 96, 1056),
    64: (64, 192, 1088),
    128: (128, 384, 1152),
    -1: (7, 100, 1100),
}
TOKENS = (1, 2, 3, 5, 17, 64)
ROWS = (1, 7, 65)


def quantized_activations(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """x rounded as the cpu backend rounds it, in float64, and each element's scale."""
    m, k = x.shape
    block = qlinear_cpu.block_columns(format)
    padded = torch.nn.functional.pad(x, (0, -k % block)).reshape(m, -1, block)
    scale = (padded.abs().amax(dim=2, keepdim=True) / 127).expand_as(padded)
    q = torch.where(scale > 0, torch.round(padded / scale), 0).clamp(-127, 127)
    return (q.double() * scale.double()).reshape(m, -1)[:, :k], scale.reshape(m, -1)[:, :k]


def bound(x: Tensor, w: QTensor) -> Tensor:
    """Largest |cpu - exact|: half an activation step times |w| per column, and float32 rounding of the sum over blocks.

    A product of a block costs three roundings, its addition one more for every later block, of terms no larger than
    sum |x| |code - zero| |s|.
    """
    _, step = quantized_activations(x, w.format)
    size = dequantize(w).double().abs()
    blocks = math.ceil(x.shape[1] / qlinear_cpu.block_columns(w.format))
    rounding = (x.double().abs() + step.double()) @ size.T * EPS * (blocks + 4)
    return step.double() / 2 * (1 + 4 * EPS) @ size.T + rounding


def exact(x: Tensor, w: QTensor) -> Tensor:
    return x.double() @ dequantize(w).double().T


def guarded(m: int, n: int) -> tuple[Tensor, Tensor]:
    """A poisoned [M, N] buffer between guard rows: (all rows, the rows to write)."""
    whole = torch.full((m + 2, n), POISON)
    return whole, whole[1:-1]


def test_reference_is_the_formula() -> None:
    w = random_weight(3, 32, Format(bits=4, group_size=16))
    x, bias = torch.randn(2, 32), torch.randn(3)
    want = torch.zeros(2, 3)
    for m, n, k in itertools.product(range(2), range(3), range(32)):
        group = k // 16
        weight = (float(w.codes[n, k]) - float(w.zeros[n, group])) * float(w.scales[n, group])
        want[m, n] += float(x[m, k]) * weight
    torch.testing.assert_close(qlinear_reference(x, w, bias), want + bias)
    assert qlinear_reference(x.bfloat16(), w).dtype == torch.bfloat16


@pytest.mark.parametrize("group_size", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_cpu_is_within_the_derived_bound_and_equals_its_definition(
    bits: int, group_size: int, isas: tuple[str, ...]
) -> None:
    fmt = Format(bits=bits, group_size=group_size)
    for k, n in itertools.product(COLUMNS[group_size], ROWS):
        w = random_weight(n, k, fmt)
        packed = qlinear_cpu.pack(w)
        for m in TOKENS:
            x, bias = torch.randn(m, k), torch.randn(n)
            rounded, _ = quantized_activations(x, fmt)
            want = rounded @ dequantize(w).double().T + bias.double()
            whole, y = guarded(m, n)
            assert qlinear_cpu.qlinear(x, packed, bias, out=y) is y
            assert bool((whole[0] == POISON).all()), "a row before the output was written"
            assert bool((whole[-1] == POISON).all()), "a row after the output was written"
            terms = rounded.abs() @ dequantize(w).double().abs().T + bias.double().abs()
            assert bool(((y.double() - want).abs() <= 1e-5 * terms).all()), f"M{m} N{n} K{k}: not its own definition"
            error = (y.double() - exact(x, w) - bias.double()).abs()
            limit = bound(x, w) + EPS * (want.abs() + bias.double().abs())
            assert bool((error <= limit).all()), f"M{m} N{n} K{k}: outside the bound"


@pytest.mark.parametrize("group_size", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    bits: int, group_size: int, isas: tuple[str, ...]
) -> None:
    fmt = Format(bits=bits, group_size=group_size)
    for k in COLUMNS[group_size]:
        packed = qlinear_cpu.pack(random_weight(77, k, fmt))
        for m in (1, 2, 3, 4, 6, 7, 9, 12, 13, 16, 31, 45):
            x = torch.randn(m, k)
            native.set_isa(isas[0])
            native.set_threads(1)
            want = qlinear_cpu.qlinear(x, packed)
            for isa, threads in itertools.product(isas, (1, 2, 3)):
                native.set_isa(isa)
                native.set_threads(threads)
                got = qlinear_cpu.qlinear(x, packed)
                assert torch.equal(got, want), f"{isa}, {threads} threads, M{m} K{k}"


@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_the_other_rows(bits: int, isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(83, 1152, Format(bits=bits, group_size=64)))
    x = torch.randn(300, 1152)
    bias = torch.randn(83)
    for isa in isas[-2:]:
        native.set_isa(isa)
        native.set_threads(2)
        together = qlinear_cpu.qlinear(x, packed, bias)
        for rows in (*range(1, 18), 31, 129, 257):
            assert torch.equal(qlinear_cpu.qlinear(x[:rows].contiguous(), packed, bias), together[:rows])
        assert torch.equal(qlinear_cpu.qlinear(x[299:], packed, bias), together[299:])


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_do_not_overflow(bits: int, group_size: int, isas: tuple[str, ...]) -> None:
    """All codes at their end and all activations at theirs: the largest sums an int16 accumulator could see."""
    fmt = Format(bits=bits, group_size=group_size)
    n, k = 17, 256
    groups = fmt.groups(k)
    rows = [torch.full((k,), sign) for sign in (1.0, -1.0)] + [torch.ones(k) * torch.tensor([1.0, -1.0]).repeat(k // 2)]
    x = torch.stack([*rows, *rows])
    for code, zero in itertools.product((0, fmt.qmax), (0, fmt.qmax)):
        w = QTensor(
            codes=torch.full((n, k), code, dtype=torch.uint8),
            zeros=torch.full((n, groups), zero, dtype=torch.uint8),
            scales=torch.ones(n, groups),
            format=fmt,
        )
        packed = qlinear_cpu.pack(w)
        for isa in isas:
            native.set_isa(isa)
            for tokens in (x, x[:1], x[1:2], x[2:3]):
                want = exact(tokens, w)
                got = qlinear_cpu.qlinear(tokens.contiguous(), packed)
                # Activations of one magnitude are exact codes; only s_a = 1/127 is rounded, once per product.
                torch.testing.assert_close(got.double(), want, rtol=4 * EPS * (k // 16), atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", BITS)
def test_nan_and_infinity_reach_their_row_and_no_other(bits: int, bad: float, isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(20, 192, Format(bits=bits, group_size=64)))
    x = torch.randn(4, 192)
    for isa, m in itertools.product(isas, (1, 4)):
        native.set_isa(isa)
        clean = qlinear_cpu.qlinear(x[:m].contiguous(), packed)
        for column in (0, 70, 191):
            spoiled = x[:m].clone()
            spoiled[m - 1, column] = bad
            y = qlinear_cpu.qlinear(spoiled, packed)
            assert bool((~y[m - 1].isfinite()).all())
            assert torch.equal(y[: m - 1], clean[: m - 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_scales_reach_their_output(bad: float, isas: tuple[str, ...]) -> None:
    scales = torch.rand(20, 3)
    scales[5, 1] = bad
    w = random_weight(20, 192, Format(bits=4, group_size=64), scales=scales)
    for isa, m in itertools.product(isas, (1, 3)):
        native.set_isa(isa)
        y = qlinear_cpu.qlinear(torch.randn(m, 192), qlinear_cpu.pack(w))
        assert bool((~y[:, 5].isfinite()).all())
        y[:, 5] = 0
        assert bool(y.isfinite().all())


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 1e34])
def test_tiny_and_huge_activations(size: float, isas: tuple[str, ...]) -> None:
    w = random_weight(9, 128, Format(bits=4, group_size=32))
    packed = qlinear_cpu.pack(w)
    x = torch.randn(3, 128) * size
    x[1] = 0
    for isa in isas:
        native.set_isa(isa)
        y = qlinear_cpu.qlinear(x, packed)
        assert bool((y[1] == 0).all())
        # Below 2^-126 scales and products keep fewer bits: one smallest subnormal per term at most.
        limit = bound(x, w) + 128 * 16 * 2.0**-149 * 128
        assert bool(((y.double() - exact(x, w)).abs() <= limit).all())


def test_scales_are_never_rounded(isas: tuple[str, ...]) -> None:
    fmt = Format(bits=4, group_size=32)
    half = torch.tensor([[2.0**-24, 65504.0], [2.0**-14, 0.333251953125]])
    x = torch.eye(64)
    for scales, kept in ((half, torch.float16), (half.half(), torch.float16), (half * 1.001, torch.float32)):
        w = QTensor(
            codes=torch.full((2, 64), 9, dtype=torch.uint8),
            zeros=torch.full((2, 2), 8, dtype=torch.uint8),
            scales=scales,
            format=fmt,
        )
        packed = qlinear_cpu.pack(w)
        assert packed.scales.dtype == kept
        for isa in isas:
            native.set_isa(isa)
            torch.testing.assert_close(
                qlinear_cpu.qlinear(x, packed),
                scales.float().repeat_interleave(32, dim=1).T,
                rtol=4 * EPS,
                atol=0,
            )


@pytest.mark.parametrize("bits", BITS)
def test_weights_take_their_bits_and_no_more(bits: int) -> None:
    if native.unavailable() is not None:
        pytest.skip("the C++ kernels are not built")
    packed = qlinear_cpu.pack(random_weight(64, 512, Format(bits=bits, group_size=64)))
    assert packed.codes.nbytes == 64 * 512 * bits // 8
    assert packed.nbytes == packed.codes.nbytes + 64 * 8 * (2 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_are_converted(dtype: torch.dtype, isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(9, 64, Format(bits=4, group_size=64)))
    x = torch.randn(2, 64).to(dtype)
    want = qlinear_cpu.qlinear(x.float(), packed).to(dtype)
    out = torch.empty(2, 9, dtype=dtype)
    assert torch.equal(qlinear_cpu.qlinear(x, packed), want)
    assert torch.equal(qlinear_cpu.qlinear(x, packed, out=out), want)
    assert torch.equal(out, want)


def test_no_tokens_give_no_rows(isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(9, 64, Format(bits=4, group_size=64)))
    assert qlinear_cpu.qlinear(torch.empty(0, 64), packed).shape == (0, 9)


def test_broken_contracts_are_refused(isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(9, 64, Format(bits=4, group_size=64)))
    x = torch.randn(2, 64)
    with pytest.raises(ContractError, match="K"):
        qlinear_cpu.qlinear(torch.randn(2, 63), packed)
    with pytest.raises(ContractError, match="contiguous"):
        qlinear_cpu.qlinear(torch.randn(64, 2).T, packed)
    with pytest.raises(ContractError, match="float64"):
        qlinear_cpu.qlinear(x.double(), packed)
    with pytest.raises(ContractError, match="bias"):
        qlinear_cpu.qlinear(x, packed, torch.randn(8))
    with pytest.raises(ContractError, match="out"):
        qlinear_cpu.qlinear(x, packed, out=torch.empty(3, 9))


def test_weights_that_do_not_fit_are_refused(isas: tuple[str, ...]) -> None:
    fmt = Format(bits=3, group_size=16)
    w = random_weight(4, 48, fmt)
    too_large = w.codes.clone()
    too_large[3, 47] = 8
    with pytest.raises(FormatError, match="codes up to 8 in int3-g16; at most 7"):
        qlinear_cpu.pack(QTensor(too_large, w.zeros, w.scales, fmt))
    with pytest.raises(FormatError, match="zero point of 9"):
        qlinear_cpu.pack(QTensor(w.codes, torch.full_like(w.zeros, 9), w.scales, fmt))
    with pytest.raises(FormatError, match=r"shape \[0, 48\]"):
        qlinear_cpu.pack(random_weight(0, 48, fmt))


def test_views_pack_like_their_copies(isas: tuple[str, ...]) -> None:
    w = random_weight(40, 96, Format(bits=3, group_size=32))
    x = torch.randn(2, 96)
    part = w.rows(7, 30)
    turned = QTensor(w.codes.T.contiguous().T, w.zeros.T.contiguous().T, w.scales.T.contiguous().T, w.format)
    whole = qlinear_cpu.qlinear(x, qlinear_cpu.pack(w))
    assert torch.equal(qlinear_cpu.qlinear(x, qlinear_cpu.pack(part)), whole[:, 7:30])
    assert torch.equal(qlinear_cpu.qlinear(x, qlinear_cpu.pack(turned)), whole)
