"""The highest score of each row in C++ (csrc/argmax.cpp). Contract in argmax.py."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import ContractError, Dims


@functools.cache
def _entry() -> Callable[..., None]:
    p, n = native.POINTER, native.INT
    return native.function("dibit_argmax", p, p, p, n, n)


def argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [R] int64, peaks [R] float32) of scores [R, V] float32. Raises ContractError."""
    if scores.dtype is not torch.float32 or scores.dim() != 2 or not scores.is_cpu or not scores.is_contiguous():
        Dims("argmax").check("scores", scores, "R V", (torch.float32,))
        raise ContractError(f"argmax: scores must be on the CPU; they are on {scores.device}")
    rows, width = scores.shape
    if width == 0:
        raise ContractError("argmax: scores have no columns; expected at least one")
    ids = tape.empty(rows, dtype=torch.int64)
    peaks = tape.empty(rows)
    _entry()(ids.data_ptr(), peaks.data_ptr(), scores.data_ptr(), rows, width)
    return ids, peaks
