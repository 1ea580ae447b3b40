"""Columns side by side in C++ (csrc/concat.cpp), float32. Contract in concat.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import ContractError, Dims


@functools.cache
def _entry() -> Callable[..., None]:
    p, n = native.POINTER, native.INT
    return native.function("dibit_copy_columns", p, p, n, n, n)


def concat(parts: Sequence[Tensor]) -> Tensor:
    """[T, sum of N_i] float32 of parts [T, N_i]. Raises ContractError."""
    dims = Dims("concat")
    for i, part in enumerate(parts):
        dims.check(f"parts[{i}]", part, f"T N{i}", (torch.float32,))
        if not part.is_cpu:
            raise ContractError(f"concat: every part must be on the CPU; parts[{i}] is on {part.device}")
    if not parts:
        raise ContractError("concat: no parts; expected at least one")
    rows, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    y = tape.empty(rows, width)
    column = y.data_ptr()
    for part in parts:
        _entry()(column, part.data_ptr(), rows, part.shape[1], width)
        column += part.shape[1] * part.element_size()
    return y
