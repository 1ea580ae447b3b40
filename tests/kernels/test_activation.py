"""The gated activation: the C++ body against float64, non-finite values, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from dibit.kernels import native
from dibit.kernels.activation import silu_mul_reference
from dibit.kernels.activation_cpu import silu_mul
from dibit.kernels.contract import ContractError

NAN = float("nan")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (3, 1), (5, 8), (70, 1001), (0, 16)])
def test_silu_mul(isa: str, rows: int, width: int, threads: int) -> None:
    native.set_threads(threads)
    gate_up = torch.randn(rows, 2 * width) * 6
    memory = torch.full((rows + 2, width), NAN)
    memory[0] = memory[-1] = 7.0
    out = memory[1:-1]
    assert silu_mul(gate_up, out=out) is out
    assert memory[0].eq(7.0).all()
    assert memory[-1].eq(7.0).all()
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate * gate.sigmoid() * up
    assert ((out.double() - expected).abs() <= 5e-7 * expected.abs()).all()
    torch.testing.assert_close(out, silu_mul_reference(gate_up))
    native.set_threads(1)
    alone = [silu_mul(row[None]) for row in gate_up]
    assert torch.equal(torch.cat(alone) if alone else out, out)


def test_silu_is_accurate_over_its_whole_range(isa: str) -> None:
    """So is the exponential that attention shares: silu is x / (1 + exp(-x))."""
    gate = torch.linspace(-87, 100, 400_001)
    y = silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0].double()
    expected = gate.double() * gate.double().sigmoid()
    assert ((y - expected).abs() <= 4e-7 * expected.abs()).all()


def test_non_finite_values_are_torchs(isa: str) -> None:
    values = torch.tensor([torch.inf, -torch.inf, NAN, -100.0, -3e38, 3e38, 0.0, -0.0, 1e-40])
    gate, up = torch.meshgrid(values, torch.tensor([1.0, -2.0, NAN, torch.inf, 0.0]), indexing="ij")
    gate_up = torch.cat([gate.flatten(), up.flatten()])[None]
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_reference(gate_up), equal_nan=True, rtol=1e-6, atol=1e-37)
    for column in range(12):
        row = torch.ones(1, 24)
        row[0, column] = NAN
        assert silu_mul(row).isnan().nonzero().tolist() == [[0, column]]


def test_wrong_tensors_are_refused() -> None:
    x = torch.randn(3, 8)
    for bad in (x.double(), x[0], x[:, ::2], torch.randn(3, 7)):
        with pytest.raises(ContractError, match="silu_mul"):
            silu_mul(bad)
    for out in (torch.empty(3, 8), torch.empty(2, 4), torch.empty(3, 4).double(), torch.empty(3, 8)[:, ::2]):
        with pytest.raises(ContractError, match="out"):
            silu_mul(x, out=out)
