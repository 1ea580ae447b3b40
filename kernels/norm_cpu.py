"""RMS normalization in C++ (csrc/norm.cpp): float32, the sum of squares in an order that depends on K only.

Contract in norm.py. `add_rms_norm` overwrites `residual` with the sum and returns it; `head_norm` overwrites `qkv`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import ContractError, Dims
from dibit.kernels.norm import check_head_norm

_F32 = torch.float32


@functools.cache
def _entry() -> Callable[..., None]:
    p, n = native.POINTER, native.INT
    return native.function("dibit_rms_norm", p, p, p, p, n, n, native.FLOAT)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """norm(x) * weight, [T, K] float32, in `out` when given (`x` itself is allowed). Raises ContractError."""
    if not (_rows(x) and _vector(weight, x)) or (out is not None and not _same(out, x)):
        _refuse("rms_norm", x, weight, None, out)
    y = tape.empty(*x.shape) if out is None else out
    _entry()(y.data_ptr(), x.data_ptr(), 0, weight.data_ptr(), x.shape[0], x.shape[1], eps)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual) * weight, residual), residual now holding the sum. `out` may be `x`. Raises ContractError."""
    if not (_rows(x) and _same(residual, x) and _vector(weight, x)) or (out is not None and not _same(out, x)):
        _refuse("add_rms_norm", x, weight, residual, out)
    y = tape.empty(*x.shape) if out is None else out
    _entry()(y.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], eps)
    return y, residual


@functools.cache
def _head_entry() -> Callable[..., None]:
    p, n = native.POINTER, native.INT
    return native.function("dibit_head_norm", p, p, p, n, n, n, n, native.FLOAT)


def head_norm(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, heads: int, eps: float) -> Tensor:
    """`qkv` [T, (H + 2 KH) D] float32 with its first H heads and the KH after them normalized in place.

    Raises ContractError.
    """
    kv_heads = check_head_norm(qkv, q_norm, k_norm, heads, reals=(_F32,))
    if not (qkv.is_cpu and q_norm.is_cpu and k_norm.is_cpu):
        raise ContractError(f"head_norm: every tensor must be on the CPU; qkv is on {qkv.device}")
    sizes = (qkv.shape[0], heads, kv_heads, q_norm.shape[0])
    _head_entry()(qkv.data_ptr(), q_norm.data_ptr(), k_norm.data_ptr(), *sizes, eps)
    return qkv


def _rows(x: Tensor) -> bool:
    return x.dtype is _F32 and x.is_cpu and x.dim() == 2 and x.is_contiguous()


def _same(other: Tensor, x: Tensor) -> bool:
    return other.dtype is _F32 and other.is_cpu and other.shape == x.shape and other.is_contiguous()


def _vector(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype is _F32 and weight.is_cpu and weight.shape == x.shape[1:] and weight.is_contiguous()


def _refuse(op: str, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor | None) -> None:
    dims = Dims(op)
    dims.check("x", x, "T K", (_F32,))
    dims.check("weight", weight, "K", (_F32,))
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            dims.check(name, tensor, "T K", (_F32,))
    raise ContractError(f"{op}: every tensor must be on the CPU; x is on {x.device}, weight on {weight.device}")
