"""Columns side by side, of every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dibit.kernels.concat import concat_reference
from dibit.kernels.concat_cpu import concat
from dibit.kernels.contract import ContractError


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize("widths", [(1,), (3, 5), (16, 1, 8), (7, 7, 7, 7)], ids=str)
def test_parts_stand_next_to_each_other(widths: tuple[int, ...], rows: int, isas: tuple[str, ...]) -> None:
    parts = [torch.randn(rows, width) for width in widths]
    assert torch.equal(concat(parts), concat_reference(parts))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "no parts"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], "parts\\[1\\] has shape"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).double()], "float64"),
        ([torch.zeros(3, 2).T], "contiguous"),
    ],
    ids=["none", "rows", "dtype", "strides"],
)
def test_other_parts_are_refused(parts: list[Tensor], words: str, isas: tuple[str, ...]) -> None:
    with pytest.raises(ContractError, match=words):
        concat(parts)
