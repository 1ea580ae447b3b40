"""Activations rounded a token at a time: the definition that every backend's integer arithmetic follows."""

from __future__ import annotations

import math

import pytest
import torch

from dibit.kernels.formats import Format, FormatError, dequantize
from dibit.kernels.qlinear import ACTIVATION_BITS, qlinear_reference, quantize_activations


@pytest.mark.parametrize("bits", ACTIVATION_BITS)
def test_every_token_has_its_own_scale_from_its_largest_value(bits: int) -> None:
    qmax = 2 ** (bits - 1) - 1
    x = torch.randn(3, 5, 33) * torch.tensor([1e-3, 1.0, 300.0])[:, None, None]
    found = quantize_activations(x, bits=bits)
    assert found.shape == x.shape
    for row, got in zip(x.view(-1, 33), found.view(-1, 33), strict=True):
        scale = row.abs().max() / qmax
        codes = got / scale
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert float(codes.abs().max()) == pytest.approx(qmax)
        assert bool(((got - row).abs() <= scale * 0.5001).all())
    assert torch.equal(quantize_activations(x[1:2], bits=bits), found[1:2]), "a token depends on its neighbours"


def test_ties_go_to_even_codes() -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_activations(x, bits=4).tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


def test_the_type_of_x_is_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert quantize_activations(torch.ones(2, 4, dtype=dtype), bits=8).dtype == dtype


def test_zeros_stay_and_what_is_not_finite_spoils_its_own_row_only() -> None:
    x = torch.ones(4, 8)
    x[0] = 0
    x[1, 3] = math.nan
    x[2, 5] = -math.inf
    found = quantize_activations(x, bits=6)
    assert found[0].tolist() == [0.0] * 8
    assert bool(found[1:3].isnan().all())
    assert found[3].tolist() == [1.0] * 8


def test_the_smallest_numbers_do_not_overflow_their_codes() -> None:
    tiny = torch.tensor([[1e-45, -3e-45, 0.0], [2e-44, 1e-45, 5e-45]])
    found = quantize_activations(tiny, bits=4)
    assert bool(found.isfinite().all())
    assert bool((found.abs() <= tiny.abs().amax(1, keepdim=True) * 2).all())


@pytest.mark.parametrize("bits", [0, 2, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=f"activations of {bits} bits; supported: 4, 6, 8"):
        quantize_activations(torch.ones(1, 1), bits=bits)


def test_the_reference_multiplies_rounded_activations() -> None:
    fmt = Format(4, 16)
    w = torch.randn(6, 32)
    q = fmt.encode(w, *fmt.ranges(w))
    x, bias = torch.randn(3, 32), torch.randn(6)
    wanted = quantize_activations(x, bits=4) @ dequantize(q).T + bias
    assert torch.equal(qlinear_reference(x, q, bias, activation_bits=4), wanted)
    assert not torch.allclose(qlinear_reference(x, q, bias), wanted, atol=1e-3)
