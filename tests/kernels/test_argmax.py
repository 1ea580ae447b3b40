"""The highest score of each row: ties, NaN, infinities, every width, any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dibit.kernels import argmax_cpu, native
from dibit.kernels.argmax import argmax_reference
from dibit.kernels.contract import ContractError

WIDTHS = (1, 2, 15, 16, 17, 255, 256, 257, 300, 4095, 4096, 4097, 40_000)


def same(scores: Tensor) -> None:
    expected_ids, expected_peaks = argmax_reference(scores)
    ids, peaks = argmax_cpu.argmax(scores)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(peaks.nan_to_num(123.0), expected_peaks.nan_to_num(123.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_it_is_the_first_of_the_highest(rows: int, threads: int, isas: tuple[str, ...]) -> None:
    native.set_threads(threads)
    for width in WIDTHS:
        scores = torch.randn(rows, width)
        same(scores)
        same(scores.round())  # ties everywhere
        same(-scores.abs() - 1e30)
        same(torch.full((rows, width), -math.inf))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_odd_scores_wherever_they_stand(odd: float, isas: tuple[str, ...]) -> None:
    native.set_threads(2)
    width = 9000
    for places in ([0], [width - 1], [257, 4096], [4095, 4096, 8999], range(width)):
        scores = torch.randn(3, width)
        scores[1, list(places)] = odd
        same(scores)


def test_nan_is_above_infinity_and_the_first_one_counts(isas: tuple[str, ...]) -> None:
    scores = torch.zeros(1, 500)
    scores[0, [3, 300, 400]] = torch.tensor([math.inf, math.nan, math.nan])
    ids, peaks = argmax_cpu.argmax(scores)
    assert ids.tolist() == [300]
    assert math.isnan(float(peaks[0]))


def test_no_rows(isas: tuple[str, ...]) -> None:
    ids, peaks = argmax_cpu.argmax(torch.empty(0, 5))
    assert (ids.shape, peaks.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "scores is torch.float64"),
        (torch.zeros(3), "expected \\[R, V\\]"),
        (torch.zeros(3, 2).T, "expected contiguous"),
        (torch.zeros(2, 0), "no columns"),
    ],
    ids=["dtype", "rank", "strides", "empty"],
)
def test_other_scores_are_refused(scores: Tensor, words: str, isas: tuple[str, ...]) -> None:
    with pytest.raises(ContractError, match=words):
        argmax_cpu.argmax(scores)
