"""The searched grid: against trying everything, against min-max, and its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit.kernels.formats import Format, QTensor, dequantize, round_scales
from dibit.quantize import grid
from dibit.quantize.grid import search_grid

FORMATS = [Format(b, g) for b in (2, 3, 4, 8) for g in (-1, 32)] + [Format(b, 32, "fractional") for b in (2, 3)]


def weight(n: int, k: int, *, seed: int, tail: float = 1.0) -> Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return w.sign() * w.abs() ** tail * 0.05


def errors(q: QTensor, w: Tensor, h: Tensor) -> Tensor:
    """Of every group."""
    return ((dequantize(q) - w).square() * h).view(*q.scales.shape, -1).sum(dim=-1)


def exhaustive(w: Tensor, format: Format, h: Tensor) -> Tensor:
    """Least error of every group over a fine net of scales and all zeros."""
    whole, _ = format.ranges(w)
    best = torch.full(whole.shape, torch.inf)
    for share in torch.linspace(0.2, 1.1, 181).tolist():
        scales = round_scales(whole * share)
        for zero in range(format.qmax + 1):
            zeros = torch.full(whole.shape, zero, dtype=torch.uint8)
            best = torch.minimum(best, errors(format.encode(w, scales, zeros), w, h))
    return best


@pytest.mark.parametrize("format", [f for f in FORMATS if f.bits < 4], ids=lambda f: f.name)
@pytest.mark.parametrize("tail", [1.0, 2.0])
def test_hardly_anything_better_exists(format: Format, tail: float) -> None:
    w, h = weight(24, 96, seed=1, tail=tail), torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.1
    found = errors(format.encode(w, *search_grid(w, format, importance=h)), w, h)
    assert float(found.sum()) < 1.04 * float(exhaustive(w, format, h).sum())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_never_worse_than_min_max(format: Format) -> None:
    for seed in range(3):
        w, h = weight(16, 96, seed=seed, tail=1.0 + seed), torch.rand(96) + 0.1
        plain = errors(format.encode(w, *format.ranges(w)), w, h)
        found = errors(format.encode(w, *search_grid(w, format, importance=h)), w, h)
        assert bool((found <= plain * (1 + 1e-5) + 1e-12).all())


def test_two_bits_gain_what_the_mathematics_promises() -> None:
    """Gaussian groups of 64: min-max costs 2.05 times the best fractional grid, the best integer one 1.21 times."""
    w, ones = weight(512, 64, seed=4), torch.ones(64)
    integer, fractional = Format(2, 64), Format(2, 64, "fractional")
    best = float(errors(fractional.encode(w, *search_grid(w, fractional)), w, ones).sum())
    assert float(errors(integer.encode(w, *integer.ranges(w)), w, ones).sum()) / best == pytest.approx(2.0, abs=0.15)
    assert float(errors(integer.encode(w, *search_grid(w, integer)), w, ones).sum()) / best == pytest.approx(
        1.18, abs=0.06
    )


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    w, h = weight(32, 64, seed=5), torch.ones(64)
    h[:8] = 100.0
    plain, weighted = (
        (dequantize(Format(2, 64).encode(w, *search_grid(w, Format(2, 64), importance=given))) - w).square().sum(dim=0)
        for given in (None, h)
    )
    assert float(weighted[:8].sum()) < 0.6 * float(plain[:8].sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_keeps_its_zero_point(bits: int) -> None:
    w = weight(8, 64, seed=6)
    scales, zeros = search_grid(w, Format(bits, 32), symmetric=True)
    assert bool((zeros == 1 << (bits - 1)).all())
    ones = torch.ones(64)
    plain = errors(Format(bits, 32).encode(w, *Format(bits, 32).ranges(w, symmetric=True)), w, ones)
    assert float(errors(Format(bits, 32).encode(w, scales, zeros), w, ones).sum()) < float(plain.sum())


def test_groups_of_zeros_and_of_one_value() -> None:
    w = torch.zeros(3, 64)
    w[1] = 0.7
    w[2, 0] = -3e4
    for target in (Format(2, 32), Format(3, -1), Format(2, 32, "fractional")):
        scales, zeros = search_grid(w, target, importance=torch.zeros(64))
        found = dequantize(target.encode(w, scales, zeros))
        assert bool(torch.isfinite(found).all())
        assert torch.equal(scales, round_scales(scales))
        torch.testing.assert_close(found[:2], w[:2], rtol=2e-3, atol=0.0)


def test_slices_do_not_change_anything_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    w, ones = weight(13, 64, seed=7), torch.ones(64)
    whole = errors(Format(2, 32).encode(w, *search_grid(w, Format(2, 32))), w, ones)
    monkeypatch.setattr(grid, "SLICE_ELEMENTS", 100)
    sliced = errors(Format(2, 32).encode(w, *search_grid(w, Format(2, 32))), w, ones)
    torch.testing.assert_close(sliced, whole, rtol=1e-3, atol=0.0)
