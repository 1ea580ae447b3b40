"""Log-probabilities of given tokens in C++ (csrc/logprob.cpp): what scoring a text needs of each row of scores."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native
from dibit.kernels.contract import ContractError, Dims

_ID_OUT_OF_RANGE = 2


@functools.cache
def _entry() -> Callable[..., int]:
    p, n = native.POINTER, native.INT
    return native.entry("dibit_logprobs", p, p, p, p, p, n, n)


def logprobs(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log softmax of scores [R, V] float32 at ids [R] int64.

    Returns log-probabilities [R] float64, summed in float64; ranks [R] int64, 1 where no score of the row is higher;
    and the highest score of each row [R] float32, NaN where one is NaN. Where that is not finite the other two mean
    nothing. Every instruction set gives ranks and peaks alike, log-probabilities to 1e-6. Raises ContractError.
    """
    dims = Dims("logprobs")
    dims.check("scores", scores, "R V", (torch.float32,))
    dims.check("ids", ids, "R", (torch.int64,))
    rows, width = scores.shape
    if width == 0:
        raise ContractError("logprobs: scores have no columns; expected at least one")
    found = torch.empty(rows, dtype=torch.float64)
    ranks = torch.empty(rows, dtype=torch.int64)
    peaks = torch.empty(rows)
    status = _entry()(
        found.data_ptr(), ranks.data_ptr(), peaks.data_ptr(), scores.data_ptr(), ids.data_ptr(), rows, width
    )
    if status == _ID_OUT_OF_RANGE:
        raise ContractError(f"logprobs: ids from {int(ids.min())} to {int(ids.max())}; rows have {width} scores")
    return found, ranks, peaks
