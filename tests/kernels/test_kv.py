"""Rows of the KV cache as stored: their size, their error, and what is not a number in them."""

from __future__ import annotations

import pytest
import torch

from dibit.kernels.contract import ContractError
from dibit.kernels.kv import GROUP, REALS, head_dim, load_rows, paired, row_width, store_rows

CODES = (torch.int8, torch.uint8)
DIMS = (2, 6, 8, 32, 34, 64, 80, 96, 128, 200, 256, 1024)


@pytest.mark.parametrize("dtype", [*REALS, *CODES], ids=str)
@pytest.mark.parametrize("d", DIMS)
def test_a_rows_width_tells_the_head_dim(d: int, dtype: torch.dtype) -> None:
    rows = store_rows(torch.randn(3, 2, d), dtype)
    assert rows.shape == (3, 2, row_width(d, dtype))
    assert rows.dtype == dtype
    assert head_dim(rows) == d


@pytest.mark.parametrize("d", DIMS)
def test_codes_are_off_by_half_a_step_of_their_own_group(d: int) -> None:
    x = torch.randn(50, d) * torch.logspace(-3, 3, d)
    for dtype, steps in ((torch.int8, 254), (torch.uint8, 15)):
        error = (load_rows(store_rows(x, dtype), d) - x).abs()
        for start in range(0, d, GROUP):
            own = x[:, start : start + GROUP]
            most, least = own.amax(1), own.amin(1)
            size = most - least if dtype == torch.uint8 else 2 * own.abs().amax(1)
            # Half a step, and what rounding scale and offset to float16 adds: steps / 2 and one roundings of 2^-11.
            bound = size / steps * 0.5 + size * 2.0**-11 + own.abs().amax(1) * 2.0**-11 + 1e-6
            assert (error[:, start : start + GROUP] <= bound[:, None]).all()


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_constants_and_a_ramp(dtype: torch.dtype) -> None:
    for x in (torch.zeros(1, 64), torch.full((1, 64), -3.5), torch.arange(-127, 129).view(4, 64).clamp(-127, 127) / 64):
        again = load_rows(store_rows(x, dtype), 64)
        if dtype == torch.uint8 and x.unique().numel() > 16:
            continue
        torch.testing.assert_close(again, x, rtol=5e-4, atol=1 / 64)
    assert torch.equal(load_rows(store_rows(torch.zeros(1, 6), dtype), 6), torch.zeros(1, 6))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_not_finite_stays_in_its_group(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(1, 96)
    x[0, 40] = value
    found = load_rows(store_rows(x, dtype), 96).isfinite()[0]
    assert found[:32].all()
    assert found[64:].all()
    assert not found[32:64].any()


def test_what_goes_together_and_what_cannot_be_stored() -> None:
    assert paired(torch.int8, torch.uint8)
    assert paired(torch.float16, torch.float16)
    assert not paired(torch.float16, torch.float32)
    assert not paired(torch.float16, torch.int8)
    for d in (5, 1026):
        with pytest.raises(ContractError, match=f"not {d}"):
            row_width(d, torch.int8)
