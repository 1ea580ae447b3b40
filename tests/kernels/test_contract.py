"""The shape checker: one letter, one size, and messages that say which tensor broke which letter."""

from __future__ import annotations

import pytest
import torch

from dibit.kernels.contract import ContractError, Dims


def test_a_letter_keeps_its_size_across_tensors() -> None:
    dims = Dims("op", K=4)
    dims.check("x", torch.zeros(3, 4), "M K")
    dims.check("y", torch.zeros(3, 7), "M N")
    dims.check("cos", torch.zeros(2, 3), "2 M")
    assert dims.sizes == {"M": 3, "K": 4, "N": 7}
    with pytest.raises(ContractError, match=r"op: bias has shape \(6,\), so N \(axis 0\) is 6; expected 7"):
        dims.check("bias", torch.zeros(6), "N")
    with pytest.raises(ContractError, match=r"2 \(axis 0\) is 3; expected 2"):
        dims.check("sin", torch.zeros(3, 3), "2 M")


def test_rank_dtype_and_strides() -> None:
    dims = Dims("op")
    with pytest.raises(ContractError, match=r"expected \[M, K\]"):
        dims.check("x", torch.zeros(3), "M K")
    with pytest.raises(ContractError, match=r"x is torch.float64; expected one of \[torch.float32\]"):
        dims.check("x", torch.zeros(3, 4, dtype=torch.float64), "M K", (torch.float32,))
    turned = torch.zeros(4, 3).T
    with pytest.raises(ContractError, match="contiguous"):
        dims.check("x", turned, "M K")
    dims.check("x", turned, "M K", contiguous=False)
