"""Rows of the KV cache as stored: their size, their error, and what is not a number in them."""

from __future__ import annotations

import math

import pytest
import torch

from dibit.kernels.contract import ContractError
from dibit.kernels.kv import CODES, FP8, GROUP, INT8, REALS, head_dim, load_rows, paired, row_width, store_rows

DIMS = (2, 6, 8, 32, 34, 64, 80, 96, 128, 200, 256, 1024)


@pytest.mark.parametrize("dtype", [*REALS, FP8, *CODES], ids=str)
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
    assert paired(FP8, FP8)
    for other in (*REALS, *CODES):
        assert not paired(FP8, other)
        assert not paired(other, FP8)
    for d in (5, 1026):
        with pytest.raises(ContractError, match=f"not {d}"):
            row_width(d, INT8)
        assert row_width(d, FP8) == d


def e4m3(byte: int) -> float:
    """What a byte stands for, by the definition."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -size if byte & 0x80 else size


def test_every_byte_of_fp8() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    found = load_rows(stored.view(FP8), 256)
    assert torch.equal(found.nan_to_num(1e9), torch.tensor([e4m3(byte) for byte in range(256)]).nan_to_num(1e9))
    # The sign of a NaN is not kept, that of zero is.
    stored[255] = 0x7F
    assert torch.equal(store_rows(found, FP8).view(torch.uint8), stored)


def test_fp8_rounds_halves_to_even_and_ends_at_448() -> None:
    """Halfway between neighbours, and a float32 to either side."""
    for byte in range(0x7E):
        low, high = e4m3(byte), e4m3(byte + 1)
        half = torch.tensor((low + high) / 2)
        near = torch.stack([torch.nextafter(half, torch.tensor(0.0)), half, torch.nextafter(half, torch.tensor(500.0))])
        wanted = [byte, byte + byte % 2, byte + 1]
        assert store_rows(near, FP8).view(torch.uint8).tolist() == wanted
        assert store_rows(-near, FP8).view(torch.uint8).tolist() == [0x80 | code for code in wanted]
    beyond = torch.tensor([448.1, 464.0, 480.0, 1e5, 3e38])
    assert store_rows(beyond, FP8).view(torch.uint8).tolist() == [0x7E] * 5
    assert store_rows(-beyond, FP8).view(torch.uint8).tolist() == [0xFE] * 5
    none = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    assert store_rows(none, FP8).view(torch.uint8).tolist() == [0x7F] * 4
    assert load_rows(store_rows(none, FP8), 4).isnan().all()
