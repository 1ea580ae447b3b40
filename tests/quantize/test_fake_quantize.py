"""The fused step against the format's own arithmetic, to the bit, and against autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit.kernels.formats import Format, ZeroGrid, dequantize, round_scales, zero_fields, zero_points
from dibit.quantize import fake_quantize as fake_quantize_module
from dibit.quantize.fake_quantize import fake_quantize, straight


def random_case(bits: int, group_size: int, grid: ZeroGrid = "integer") -> tuple[Tensor, Tensor, Tensor, Format]:
    """Ranges that cut some weights off, zeros that are not whole and not all inside the range."""
    rng = torch.Generator().manual_seed(bits)
    w = torch.randn(10, 64, generator=rng)
    chosen = Format(bits, group_size, grid)
    scales, zeros = chosen.ranges(w * 0.6)
    scales = scales * (1 + 0.1 * torch.randn(scales.shape, generator=rng))
    return w, scales, zero_points(zeros, chosen) + torch.randn(zeros.shape, generator=rng), chosen


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_value_is_that_of_the_packed_weight(bits: int, group_size: int) -> None:
    w, scales, zeros, chosen = random_case(bits, group_size)
    whole = torch.round(zeros).clamp(0, chosen.qmax).to(torch.uint8)
    packed = chosen.encode(w, round_scales(scales), whole)
    assert torch.equal(fake_quantize(w, scales, zeros, chosen), dequantize(packed))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group_size", [16, -1])
def test_fractional_values_are_those_of_the_packed_weight(bits: int, group_size: int) -> None:
    w, scales, zeros, chosen = random_case(bits, group_size, "fractional")
    packed = chosen.encode(w, round_scales(scales), zero_fields(zeros, chosen))
    assert torch.equal(fake_quantize(w, scales, zeros, chosen), dequantize(packed))


@pytest.mark.parametrize("bits", [2, 3])
def test_fractional_gradients_are_those_of_the_plain_formula(bits: int) -> None:
    w, scales, zeros, chosen = random_case(bits, 16, "fractional")
    inputs = [t.clone().requires_grad_() for t in (w, scales, zeros)]
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(9))
    (fake_quantize(inputs[0], inputs[1], inputs[2], chosen) * weight).sum().backward()
    plain = [t.clone().requires_grad_() for t in (w, scales, zeros)]
    s = straight(plain[1], round_scales(scales))[..., None]
    z = straight(plain[2], zero_points(zero_fields(zeros, chosen), chosen))[..., None]
    exact = plain[0].view(10, 4, 16) / s + z
    levels = straight(exact, torch.round(exact.detach())).clamp(0, chosen.qmax)
    (((levels - z) * s).view(10, 64) * weight).sum().backward()
    for found, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_those_of_the_plain_formula(bits: int) -> None:
    w, scales, zeros, chosen = random_case(bits, 16)
    inputs = [t.clone().requires_grad_() for t in (w, scales, zeros)]
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(9))
    (fake_quantize(inputs[0], inputs[1], inputs[2], chosen) * weight).sum().backward()
    plain = [t.clone().requires_grad_() for t in (w, scales, zeros)]
    s = straight(plain[1], round_scales(scales))[..., None]
    z = straight(plain[2], torch.round(zeros).clamp(0, chosen.qmax))[..., None]
    ratio = plain[0].view(10, 4, 16) / s
    levels = (straight(ratio, torch.round(ratio.detach())) + z).clamp(0, chosen.qmax)
    cut = float((levels.detach() != torch.round(ratio.detach()) + z.detach()).float().mean())
    assert 0.02 < cut < 0.9
    (((levels - z) * s).view(10, 64) * weight).sum().backward()
    for found, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_are_computed() -> None:
    w, scales, zeros, chosen = random_case(3, 16)
    scales.requires_grad_()
    fake_quantize(w, scales, zeros, chosen).sum().backward()
    assert scales.grad is not None
    assert w.grad is None


def test_settled_codes_are_constants() -> None:
    """Their gradients are those of (q - z) s with q fixed; all others are as without."""
    w, scales, zeros, chosen = random_case(3, 16)
    settled = torch.rand(w.shape, generator=torch.Generator().manual_seed(8)) < 0.5
    weight = torch.randn(w.shape, generator=torch.Generator().manual_seed(9))
    grads = []
    for mask in (None, settled, ~settled):
        inputs = [t.clone().requires_grad_() for t in (w, scales, zeros)]
        out = fake_quantize(inputs[0], inputs[1], inputs[2], chosen, settled=mask)
        kept = weight if mask is None else weight * ~mask
        (out * kept).sum().backward()
        grads.append([t.grad for t in inputs])
    for free, first, second in zip(*grads, strict=True):
        torch.testing.assert_close(free, first + second, rtol=1e-4, atol=1e-4)
    s, z = (t.clone().requires_grad_() for t in (scales, zeros))
    held = w.clone().requires_grad_()
    out = fake_quantize(held, s, z, chosen, settled=torch.ones_like(settled))
    (out * weight).sum().backward()
    assert not bool(held.grad.any())
    codes = out.detach().view(10, 4, 16) / round_scales(scales)[..., None]
    grouped = weight.view(10, 4, 16)
    torch.testing.assert_close(s.grad, (grouped * codes).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z.grad, -grouped.sum(-1) * round_scales(scales), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 100, 64 * 3])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    w, scales, zeros, chosen = random_case(2, 16)
    found = []
    for size in (1 << 20, elements):
        monkeypatch.setattr(fake_quantize_module, "PIECE_ELEMENTS", size)
        inputs = [t.clone().requires_grad_() for t in (w, scales, zeros)]
        out = fake_quantize(inputs[0], inputs[1], inputs[2], chosen)
        (out * out.detach()).sum().backward()
        found.append([out.detach(), *(t.grad for t in inputs)])
    for whole, pieces in zip(*found, strict=True):
        assert torch.equal(whole, pieces)
