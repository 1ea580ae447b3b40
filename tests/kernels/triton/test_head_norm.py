"""Norms of query and key heads in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from dibit.kernels.contract import ContractError
from dibit.kernels.norm import head_norm_reference
from dibit.kernels.triton.head_norm import head_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("t", "heads", "kv_heads", "d"), [(1, 3, 1, 16), (5, 2, 2, 24), (3, 4, 2, 128)])
def test_head_norm(t: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    qkv = (torch.randn(t, (heads + 2 * kv_heads) * d) * 3).to(dtype)
    q_norm, k_norm, values = torch.randn(d), torch.randn(d), qkv[:, (heads + kv_heads) * d :].clone()
    expected = head_norm_reference(qkv, q_norm, k_norm, heads, 1e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    got = head_norm(qkv, q_norm, k_norm, heads, 1e-6)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[:, (heads + kv_heads) * d :], values)


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(ContractError, match="head_norm: qkv has 32 columns"):
        head_norm(torch.zeros(1, 32), torch.ones(8), torch.ones(8), 3, 1e-6)
