"""Rows of a quantized embedding out of the layout of the quantized linear: a tied head and embedding are one weight
in memory. The same bits as the reference: (code - zero) * scale, rounded once.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import Dims
from dibit.kernels.qlinear_cpu import CpuQWeight, QWeightStruct

_TYPES = (ctypes.POINTER(QWeightStruct), native.POINTER, native.INT, native.POINTER)
_BAD_ID = 3


def embedding(ids: Tensor, w: CpuQWeight) -> Tensor:
    """ids [T] int64 -> [T, K] float32; IndexError for an id outside [0, V)."""
    Dims("embedding").check("ids", ids, "T", (torch.int64,))
    y = tape.empty(ids.shape[0], w.k)
    status = native.entry("dibit_embedding", *_TYPES)(
        ctypes.byref(w.native), ids.data_ptr(), ids.shape[0], y.data_ptr()
    )
    if status == _BAD_ID:
        raise IndexError(f"token ids from {int(ids.min())} to {int(ids.max())}; the table has {w.n} rows")
    if status != 0:
        raise native.NativeError(f"dibit_embedding refused its arguments (status {status})")
    return y
