"""SiLU-gated product in C++ (csrc/activation.cpp), float32. Contract in activation.py.

silu's relative error is below 4e-7 for gates above -87; below, where |silu| < 2e-36, the result is -0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import ContractError, Dims

_F32 = torch.float32


@functools.cache
def _entry() -> Callable[..., None]:
    return native.function("dibit_silu_mul", native.POINTER, native.POINTER, native.INT, native.INT)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [T, I] float32, in `out` when given. Raises ContractError."""
    if gate_up.dtype is not _F32 or gate_up.dim() != 2 or not gate_up.is_cpu or not gate_up.is_contiguous():
        _refuse(gate_up, out)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if 2 * width != gate_up.shape[1]:
        _refuse(gate_up, out)
    if out is None:
        out = tape.empty(rows, width)
    elif out.dtype is not _F32 or not out.is_cpu or out.shape != (rows, width) or not out.is_contiguous():
        _refuse(gate_up, out)
    _entry()(out.data_ptr(), gate_up.data_ptr(), rows, width)
    return out


def _refuse(gate_up: Tensor, out: Tensor | None) -> None:
    Dims("silu_mul").check("gate_up", gate_up, "T 2I", (_F32,))
    rows, columns = gate_up.shape
    if columns % 2:
        raise ContractError(f"silu_mul: gate_up has {columns} columns; expected an even number, the gate's then up's")
    if out is not None:
        Dims("silu_mul", T=rows, I=columns // 2).check("out", out, "T I", (_F32,))
    raise ContractError("silu_mul: gate_up and out must be on the CPU")
