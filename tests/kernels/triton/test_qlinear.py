"""The quantized linear in the interpreter: against the reference within the derived bound, against the cpu backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels import native, qlinear_cpu
from dibit.kernels.contract import ContractError
from dibit.kernels.formats import BITS, Format, QTensor, dequantize, zero_points
from dibit.kernels.triton import layout
from dibit.kernels.triton.availability import INTERPRETER
from dibit.kernels.triton.plan import plan
from dibit.kernels.triton.qlinear import multiply, prepare, qlinear

EPS = torch.finfo(torch.float32).eps
POISON = 1.0e30
SHAPES = {2: (65, 384), 3: (65, 384), 4: (70, 320), 8: (65, 160)}


def bound(x: Tensor, w: QTensor) -> Tensor:
    """Largest |triton - exact|: float16 rounding of x, and float32 rounding of sums whose terms are codes and zeros
    apart (the zero point is subtracted from the group's sum, not from each code)."""
    n, k = w.shape
    size = dequantize(w).double().abs()
    largest = x.double().abs().amax(dim=1, keepdim=True)
    rounding = (x.double().abs() * 2.0**-11 + largest * 2.0**-35) @ size.T
    grouped = w.codes.reshape(n, w.format.groups(k), -1).double() + zero_points(w.zeros, w.format).double()[..., None]
    terms = (grouped * w.scales.double()[..., None]).reshape(n, k)
    return rounding + x.double().abs() @ terms.T * EPS * (k + 8)


def exact(x: Tensor, w: QTensor) -> Tensor:
    return x.double() @ dequantize(w).double().T


def guarded(m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    whole = torch.full((m + 2, n), POISON if dtype == torch.float32 else 60000.0, dtype=dtype)
    return whole, whole[1:-1]


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_within_the_derived_bound(bits: int, group_size: int) -> None:
    fmt = Format(bits, group_size)
    n, k = SHAPES[bits]
    k = k - 7 if group_size == -1 else k + -k % group_size
    w = random_weight(n, k, fmt)
    packed = layout.pack(w)
    for m in (1, 17):
        x, bias = torch.randn(m, k) * 10.0 ** torch.randint(-3, 4, (m, 1)), torch.randn(n)
        whole, y = guarded(m, n)
        assert qlinear(x, packed, bias, out=y) is y
        assert bool((whole[0] == POISON).all()), "a row before the output was written"
        assert bool((whole[-1] == POISON).all()), "a row after the output was written"
        want = exact(x, w) + bias.double()
        limit = bound(x, w) + EPS * want.abs()
        assert bool(((y.double() - want).abs() <= limit).all()), f"M{m}: outside the bound"


@pytest.mark.parametrize(
    ("bits", "group_size", "tokens"), [(2, 64, (3,)), (3, 128, (1,)), (4, 32, (8, 17)), (8, -1, (1, 3, 8, 17, 64))]
)
def test_a_row_does_not_depend_on_the_other_rows(bits: int, group_size: int, tokens: tuple[int, ...]) -> None:
    """Over every block of tokens, and over runs side by side and one after another.

    Small whole numbers make the sums within a group exact, whatever order the interpreter's dot takes; what is left is
    the kernels' own order of scaling and adding.
    """
    fmt = Format(bits, group_size)
    k = 8 * layout.Geometry.of(fmt, 1 if group_size == -1 else group_size).step_columns
    w = random_weight(64, k, fmt)
    packed = layout.pack(w)
    x = torch.randint(-8, 9, (65, k)).float()
    together = qlinear(x, packed)
    assert bool(((together.double() - exact(x, w)).abs() <= bound(x, w)).all())
    chosen = [plan(packed.geometry, 64, m, gpu=INTERPRETER) for m in (1, 65)]
    assert chosen[0].splits == chosen[1].splits > 1
    assert [p.partial for p in chosen] == [True, False]
    for m in tokens:
        assert torch.equal(qlinear(x[:m].contiguous(), packed), together[:m]), f"M{m}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [64, 128])
def test_half_types_bias_and_residual(dtype: torch.dtype, rows: int) -> None:
    w = random_weight(rows - 3, 256, Format(4, 64))
    packed = layout.pack(w)
    x, bias = torch.randn(3, 256).to(dtype), torch.randn(rows - 3)
    residual = torch.randn(3, rows - 3).to(dtype)
    whole, y = guarded(3, rows - 3, dtype)
    qlinear(x, packed, bias, residual=residual, out=y)
    assert bool((whole[0] == whole[-1]).all())
    want = exact(x, w) + bias.double() + residual.double()
    limit = bound(x, w) + want.abs() * torch.finfo(dtype).eps
    assert bool(((y.double() - want).abs() <= limit).all())


@pytest.mark.parametrize("block_rows", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_every_block_of_rows_gives_the_same_bits(bits: int, block_rows: int) -> None:
    w = random_weight(128, 512, Format(bits, 128))
    packed = layout.pack(w)
    x = torch.randint(-8, 9, (2, 512)).float()
    chosen = dataclasses.replace(plan(packed.geometry, 128, 2, gpu=INTERPRETER), block_rows=block_rows)
    y = torch.full((2, 128), POISON)
    multiply(prepare(x, packed, padded_tokens=8), packed, chosen, y, bias=None, residual=None)
    assert torch.equal(y, qlinear(x, packed))


@pytest.mark.parametrize("bits", [2, 3])
def test_fractional_zero_points(bits: int) -> None:
    w = random_weight(64, 256, Format(bits, 64, zero_grid="fractional"))
    x = torch.randn(2, 256)
    difference = (qlinear(x, layout.pack(w)).double() - exact(x, w)).abs()
    assert bool((difference <= bound(x, w)).all())


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_cpu_backend(bits: int) -> None:
    """One QTensor, two layouts: the outputs differ by no more than both bounds together."""
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    w = random_weight(70, 512, Format(bits, 64))
    x = torch.randn(5, 512)
    block = qlinear_cpu.block_columns(w.format)
    step = (x.reshape(5, -1, block).abs().amax(dim=2, keepdim=True) / 127).expand(5, 512 // block, block).reshape(5, -1)
    cpu_bound = (step.double() / 2) @ dequantize(w).double().abs().T * 1.001
    difference = (qlinear(x, layout.pack(w)) - qlinear_cpu.qlinear(x, qlinear_cpu.pack(w))).abs().double()
    assert bool((difference <= 2 * bound(x, w) + cpu_bound).all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_a_number_stays_in_its_row() -> None:
    w = random_weight(64, 128, Format(4, 64))
    w.codes[0] = 0
    x = torch.randn(3, 128)
    clean = qlinear(x, layout.pack(w))
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    y = qlinear(x, layout.pack(w))
    assert torch.equal(y[0], clean[0])
    assert bool(y[1].isnan().all())
    assert bool((~y[2].isfinite()).all())


def test_zero_rows_and_tiny_values() -> None:
    w = random_weight(64, 128, Format(2, 32))
    packed = layout.pack(w)
    x = torch.cat([torch.zeros(1, 128), torch.randn(1, 128) * 1e-20])
    y = qlinear(x, packed)
    assert bool((y[0] == 0).all())
    assert bool(((y[1:].double() - exact(x[1:], w)).abs() <= bound(x[1:], w)).all())
    assert qlinear(torch.empty(0, 128), packed).shape == (0, 64)


def test_shapes_are_checked() -> None:
    packed = layout.pack(random_weight(64, 128, Format(4, 64)))
    with pytest.raises(ContractError, match=r"x has shape \(2, 64\), so K"):
        qlinear(torch.zeros(2, 64), packed)
    with pytest.raises(ContractError, match=r"bias has shape \(3,\), so N"):
        qlinear(torch.zeros(2, 128), packed, torch.zeros(3))
