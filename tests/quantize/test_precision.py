"""The type of the products of training."""

from __future__ import annotations

import pytest
import torch

from dibit.engine.errors import ConfigError
from dibit.quantize import precision
from dibit.quantize.precision import check_precision, product_type, products
from dibit.quantize.trainer import Schedule


@pytest.mark.parametrize("units", [True, False])
def test_auto_takes_bfloat16_only_where_the_cpu_has_matrix_units(
    *, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units, raising=False)
    assert product_type("auto") is (torch.bfloat16 if units else torch.float32)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert product_type("auto") is torch.float32


def test_products_are_rounded_and_what_is_around_them_is_not() -> None:
    a = torch.full((4, 4), 1 + 2**-12)
    with products("bfloat16"):
        low, kept = a @ a, a + a
    with products("float32"):
        full = a @ a
    assert low.dtype is torch.bfloat16
    assert torch.equal(kept, 2 * a)
    assert float(full[0, 0]) == pytest.approx(4 * (1 + 2**-12) ** 2, rel=1e-7)
    assert float(low[0, 0]) == 4.0


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="supported: auto, float32, bfloat16"):
        check_precision("float16")
    with pytest.raises(ConfigError, match="precision"):
        Schedule(steps=1, batch=1, held_out=0.1, precision="half")
    assert precision.PRECISIONS == ("auto", "float32", "bfloat16")
