"""The quantized linear with fractional zero points and with activations rounded a token at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels import native, qlinear_cpu, tape
from dibit.kernels.formats import BITS, FRACTIONAL_BITS, Format, FormatError, QTensor, dequantize
from dibit.kernels.qlinear import ACTIVATION_BITS, qlinear_reference, quantize_activations

EPS = torch.finfo(torch.float32).eps
POISON = 1.0e30

# Group size and K: one group, an odd number of groups, more than one chunk of 1024 columns, columns that fill no block.
COLUMNS = {16: (16, 1040), 32: (96,), 64: (192, 1088), 128: (384,), -1: (7, 1100)}
FRACTIONAL = [Format(bits, group, "fractional") for bits in FRACTIONAL_BITS for group in COLUMNS]
INTEGER = [Format(bits, group) for bits in BITS for group in COLUMNS]


def poisoned(m: int, n: int) -> tuple[Tensor, Tensor]:
    """An [M, N] buffer between guard rows: (all rows, the rows to write)."""
    whole = torch.full((m + 2, n), POISON)
    return whole, whole[1:-1]


def check(y: Tensor, x: Tensor, w: QTensor, bias: Tensor | None = None) -> None:
    """y is x · dequantize(w)ᵀ + bias up to float32: a few roundings of each product and one per block of the sum."""
    weights = dequantize(w).double()
    offset = torch.zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double()
    want = x.double() @ weights.T + offset
    # A zero point that is a fraction is rounded, and isum - z * asum once more: relative to code and zero apart.
    size = (
        weights.abs() + w.scales.double().repeat_interleave(w.format.columns_per_group(w.shape[1]), 1) * w.format.qmax
    )
    blocks = math.ceil(x.shape[1] / qlinear_cpu.block_columns(w.format))
    limit = (x.double().abs() @ size.T + offset.abs()) * EPS * (blocks + 6)
    assert bool(((y.double() - want).abs() <= limit).all())


def rounded_by_blocks(x: Tensor, format: Format) -> Tensor:
    """x as the cpu backend rounds it without activation_bits."""
    block = qlinear_cpu.block_columns(format)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).reshape(x.shape[0], -1, block)
    return quantize_activations(padded, bits=8).reshape(x.shape[0], -1)[:, : x.shape[1]]


@pytest.mark.parametrize("format", FRACTIONAL, ids=lambda chosen: chosen.name)
def test_fractional_zero_points_equal_the_definition(format: Format, isas: tuple[str, ...]) -> None:
    for k, n in itertools.product(COLUMNS[format.group_size], (1, 65)):
        w = random_weight(n, k, format)
        packed = qlinear_cpu.pack(w)
        for m in (1, 2, 5, 17):
            x, bias = torch.randn(m, k), torch.randn(n)
            found = []
            for isa in isas:
                native.set_isa(isa)
                whole, y = poisoned(m, n)
                qlinear_cpu.qlinear(x, packed, bias, out=y)
                assert bool((whole[0] == POISON).all())
                assert bool((whole[-1] == POISON).all())
                check(y, rounded_by_blocks(x, format), w, bias)
                found.append(y)
            assert all(torch.equal(y, found[0]) for y in found), "instruction sets differ"


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("format", [*INTEGER, *FRACTIONAL], ids=lambda chosen: chosen.name)
def test_activation_bits_equal_the_reference(format: Format, activation_bits: int, isas: tuple[str, ...]) -> None:
    for k, n in itertools.product(COLUMNS[format.group_size], (1, 40)):
        w = random_weight(n, k, format)
        packed = qlinear_cpu.pack(w)
        for m in (1, 3, 13):
            x, bias = torch.randn(m, k) * 10, torch.randn(n)
            x[0, k // 2] = 60.0
            rounded = quantize_activations(x, bits=activation_bits)
            check(qlinear_reference(x, w, bias, activation_bits=activation_bits), rounded, w, bias)
            found = []
            for isa in isas:
                native.set_isa(isa)
                whole, y = poisoned(m, n)
                qlinear_cpu.qlinear(x, packed, bias, activation_bits=activation_bits, out=y)
                assert bool((whole[0] == POISON).all())
                assert bool((whole[-1] == POISON).all())
                check(y, rounded, w, bias)
                found.append(y)
            assert all(torch.equal(y, found[0]) for y in found), "instruction sets differ"


@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
def test_a_row_does_not_depend_on_the_other_rows(activation_bits: int, isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(83, 1152, Format(2, 64, "fractional")))
    x = torch.randn(150, 1152) * torch.rand(150, 1).mul(4).exp()
    for isa, threads in itertools.product(isas[-2:], (1, 3)):
        native.set_isa(isa)
        native.set_threads(threads)
        together = qlinear_cpu.qlinear(x, packed, activation_bits=activation_bits)
        for rows in (1, 2, 3, 13, 129):
            alone = qlinear_cpu.qlinear(x[:rows].contiguous(), packed, activation_bits=activation_bits)
            assert torch.equal(alone, together[:rows])
        assert torch.equal(qlinear_cpu.qlinear(x[149:], packed, activation_bits=activation_bits), together[149:])


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_codes_do_not_overflow(bits: int, isas: tuple[str, ...]) -> None:
    x = torch.stack([torch.ones(256), -torch.ones(256), torch.tensor([1.0, -1.0]).repeat(128)])
    grids = ["integer", "fractional"] if bits in FRACTIONAL_BITS else ["integer"]
    for grid, group, activation_bits in itertools.product(grids, (16, 64, -1), ACTIVATION_BITS):
        fmt = Format(bits, group, grid)  # type: ignore[arg-type]
        groups = fmt.groups(256)
        for code, zero in itertools.product((0, fmt.qmax), (0, fmt.qmax)):
            w = QTensor(
                torch.full((17, 256), code, dtype=torch.uint8),
                torch.full((17, groups), zero, dtype=torch.uint8),
                torch.ones(17, groups),
                fmt,
            )
            packed = qlinear_cpu.pack(w)
            for isa in isas:
                native.set_isa(isa)
                check(qlinear_cpu.qlinear(x, packed, activation_bits=activation_bits), x, w)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(bad: float, isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(20, 200, Format(4, -1)))
    x = torch.randn(4, 200)
    for isa in isas:
        native.set_isa(isa)
        clean = qlinear_cpu.qlinear(x, packed, activation_bits=8)
        for column in (0, 70, 199):
            spoiled = x.clone()
            spoiled[2, column] = bad
            y = qlinear_cpu.qlinear(spoiled, packed, activation_bits=8)
            assert bool(y[2].isnan().all())
            y[2] = clean[2]
            assert torch.equal(y, clean)


def test_zeros_and_the_smallest_numbers(isas: tuple[str, ...]) -> None:
    w = random_weight(9, 96, Format(4, 32))
    packed = qlinear_cpu.pack(w)
    x = torch.stack([torch.zeros(96), torch.full((96,), 1e-45), torch.randn(96) * 1e-42])
    for isa in isas:
        native.set_isa(isa)
        y = qlinear_cpu.qlinear(x, packed, activation_bits=6)
        assert bool((y[0] == 0).all())
        assert bool(y.isfinite().all())
        want = quantize_activations(x, bits=6).double() @ dequantize(w).double().T
        assert bool(((y.double() - want).abs() <= 96 * 16 * 2.0**-149 * 96).all())


def test_activation_bits_are_on_the_tape(isas: tuple[str, ...]) -> None:
    w = random_weight(24, 64, Format(4, 32))
    packed = qlinear_cpu.pack(w)
    x = torch.randn(2, 64)
    with tape.record(tape.Workspace(2)) as recording:
        y = qlinear_cpu.qlinear(x, packed, activation_bits=4)
    recorded = recording.tape()
    assert recorded is not None
    x.copy_(torch.randn(2, 64) * 3)
    recorded.run()
    assert torch.equal(y, qlinear_cpu.qlinear(x, packed, activation_bits=4))
    assert not torch.equal(y, qlinear_cpu.qlinear(x, packed))


def test_other_widths_are_refused(isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(random_weight(9, 64, Format(4, 64)))
    for bits in (0, 1, 5, 9, 16):
        with pytest.raises(FormatError, match=f"activations of {bits} bits; supported: 4, 6, 8"):
            qlinear_cpu.qlinear(torch.randn(2, 64), packed, activation_bits=bits)
