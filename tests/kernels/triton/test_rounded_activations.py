"""Products with activations rounded to 4, 6 and 8 bits in the interpreter: the reference's integers, exact sums."""

from __future__ import annotations

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels import native, qlinear_cpu
from dibit.kernels.formats import BITS, Format, FormatError, dequantize, zero_points
from dibit.kernels.qlinear import ACTIVATION_BITS, quantize_activations
from dibit.kernels.triton import fused, layout
from dibit.kernels.triton.layout import PLANE_COLUMNS, TritonQWeight, plane_shift
from dibit.kernels.triton.qlinear import Prepared, launch_runs, plan_of, prepare, qlinear

EPS = torch.finfo(torch.float32).eps
GROUPS = (32, 64, 128, -1)


def integers(made: Prepared, w: TritonQWeight) -> Tensor:
    """What is multiplied, [MP, KP]: the planes' shifts undone."""
    columns = torch.arange(w.geometry.columns)
    planes = columns % w.geometry.unit_columns // PLANE_COLUMNS
    shifts = torch.tensor([plane_shift(w.format.bits, p) for p in range(w.geometry.planes)])
    return made.half.float() * 2.0 ** shifts[planes]


@pytest.mark.parametrize("weight", [Format(2, 64), Format(3, 128), Format(4, -1), Format(8, 32)], ids=lambda f: f.name)
@pytest.mark.parametrize("bits", ACTIVATION_BITS)
def test_the_integers_of_the_reference(bits: int, weight: Format) -> None:
    k = 384 if weight.group_size > 0 else 301
    w = layout.pack(random_weight(5, k, weight))
    x = torch.randn(7, k) * 10.0 ** torch.randint(-6, 7, (7, 1))
    x[2] = 0.0
    qmax = 2 ** (bits - 1) - 1
    # Halves of steps, which go to even numbers.
    x[3] = (torch.arange(k) % 5).float() - 2.5
    x[3, 0] = qmax
    made = prepare(x, w, padded_tokens=8, activation_bits=bits)
    largest = x.abs().amax(1)
    scales = largest / qmax
    codes = torch.round(x / torch.where(scales == 0, 1.0, scales)[:, None]).clamp(-qmax, qmax)
    assert torch.equal(made.factors[:7], scales)
    found = integers(made, w)
    assert torch.equal(found[:7, :k], codes)
    assert not found[7:].any()
    assert not found[:, k:].any()
    assert torch.equal(found[:7, :k] * made.factors[:7, None], quantize_activations(x, bits=bits))
    assert float(made.sums[:, :7].sum()) == float(codes.sum())


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_sums_are_exact_within_a_group(bits: int, group_size: int) -> None:
    """What rounds is the scaling: of each group, of the sum of groups, and of the token."""
    fmt = Format(bits, group_size)
    n, k = 61, 384 if group_size > 0 else 389
    w = random_weight(n, k, fmt)
    # Every width of weights and every group size meets every number of tokens and width of activations.
    m, activation_bits = ((1, 8), (3, 4), (17, 6))[(BITS.index(bits) + GROUPS.index(group_size)) % 3]
    x, bias = torch.randn(m, k), torch.randn(n)
    y = qlinear(x, layout.pack(w), bias, activation_bits=activation_bits)
    rounded = quantize_activations(x, bits=activation_bits).double()
    want = rounded @ dequantize(w).double().T + bias.double()
    groups = fmt.groups(k)
    grouped = w.codes.reshape(n, groups, -1).double() + zero_points(w.zeros, fmt).double()[..., None]
    terms = (grouped * w.scales.double()[..., None]).reshape(n, k)
    limit = EPS * ((groups + 6) * rounded.abs() @ terms.T + want.abs() + bias.double().abs())
    assert bool(((y.double() - want).abs() <= limit).all())


@pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")
def test_the_cpu_backend_multiplies_the_same_integers() -> None:
    w = random_weight(70, 256, Format(4, 64))
    x = torch.randn(5, 256)
    found = qlinear(x, layout.pack(w), activation_bits=8)
    want = qlinear_cpu.qlinear(x, qlinear_cpu.pack(w), activation_bits=8)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=float(want.abs().max()) * 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_becomes_nan_alone(bad: float) -> None:
    w = layout.pack(random_weight(64, 128, Format(4, 64)))
    x = torch.randn(3, 128)
    x[1, 77] = bad
    y = qlinear(x, w, activation_bits=8)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


def test_other_widths_are_refused() -> None:
    w = layout.pack(random_weight(64, 128, Format(4, 64)))
    with pytest.raises(FormatError, match="activations of 5 bits"):
        qlinear(torch.randn(1, 128), w, activation_bits=5)


def test_fused_ops_round_alike() -> None:
    """A float32 sum in another order may move an element across the border of two integers, no further."""
    before, after = (
        layout.pack(random_weight(128, 512, Format(4, 64))),
        layout.pack(random_weight(64, 128, Format(4, 32))),
    )
    x, norm, residual = torch.randn(3, 512), torch.rand(128) + 0.5, torch.randn(3, 128)
    made = prepare(x, before, padded_tokens=plan_of(before, 3).padded_tokens(3), activation_bits=8)
    runs = launch_runs(made, before, plan_of(before, 3), bias=None)
    found = fused.norm_prepared(runs, residual.clone(), norm, 1e-5, after, activation_bits=8)
    total = qlinear(x, before, activation_bits=8) + residual
    want = total * torch.rsqrt(total.square().mean(1, keepdim=True) + 1e-5) * norm
    codes = torch.round(want / (want.abs().amax(1, keepdim=True) / 127))
    torch.testing.assert_close(found.factors[:3], want.abs().amax(1) / 127, rtol=1e-5, atol=0.0)
    assert float((integers(found, after)[:3] - codes).abs().max()) <= 1.0
    assert bool((integers(found, after) == integers(found, after).round()).all())
