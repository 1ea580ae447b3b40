"""Tokens drawn in C++ (csrc/sample.cpp): temperature, min_p, top_k and top_p of a row, and the draw.

The definition is that of engine/draw.py, with weights from this library's own exp: the same row,
parameters, seed and count give the same id on every machine, whatever else is in the step.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import ContractError, Dims

_WORD = (1 << 64) - 1


class Draws:
    """How up to `max_rows` rows are drawn. Its memory stays where it is, so that a tape may read it.

    filters  [max_rows, 3]: temperature, min_p, top_p
    words    [max_rows, 5]: 1 for the highest score or 0 for a draw, top_k, the seed's low and high word, the count
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.filters = array("d", bytes(8 * 3 * max_rows))
        self.words = array("Q", [1, 0, 0, 0, 0] * max_rows)

    def greedy(self, row: int) -> None:
        """The row's id is that of its highest score."""
        self.words[5 * row] = 1

    def draw(self, row: int, *, temperature: float, min_p: float, top_k: int, top_p: float, seed: int) -> None:
        """The row's id is drawn; top_k 0 or less, min_p 0 and top_p 1 filter nothing. The count becomes 0."""
        self.filters[3 * row] = temperature
        self.filters[3 * row + 1] = min_p
        self.filters[3 * row + 2] = top_p
        words = (0, max(0, top_k), seed & _WORD, seed >> 64 & _WORD, 0)
        for place, word in enumerate(words, start=5 * row):
            self.words[place] = word

    def count(self, row: int, count: int) -> None:
        """Which number of the row's seed is used."""
        self.words[5 * row + 4] = count

    @property
    def addresses(self) -> tuple[int, int]:
        return self.filters.buffer_info()[0], self.words.buffer_info()[0]


@functools.cache
def _entry() -> Callable[..., None]:
    p, n = native.POINTER, native.INT
    return native.function("dibit_sample", p, p, p, p, p, p, n, n)


def sample(scores: Tensor, best: Tensor, peaks: Tensor, draws: Draws) -> Tensor:
    """Ids [R] int64 of scores [R, V] float32, whose highest are best [R] int64 and peaks [R] float32 (argmax.py).

    A row whose peak is not finite gets its best. Raises ContractError.
    """
    dims = Dims("sample")
    dims.check("scores", scores, "R V", (torch.float32,))
    dims.check("best", best, "R", (torch.int64,))
    dims.check("peaks", peaks, "R", (torch.float32,))
    rows, width = scores.shape
    if rows > draws.max_rows or width == 0:
        raise ContractError(f"sample: scores are {rows} x {width}; expected 1 to {draws.max_rows} rows with columns")
    ids = tape.empty(rows, dtype=torch.int64)
    filters, words = draws.addresses
    _entry()(ids.data_ptr(), scores.data_ptr(), best.data_ptr(), peaks.data_ptr(), filters, words, rows, width)
    return ids


def uniforms(draws: Draws) -> array[float]:
    """The number in [0, 1) that each row is drawn with, [max_rows]; any number for a greedy one."""
    p, n = native.POINTER, native.INT
    numbers = array("d", bytes(8 * draws.max_rows))
    native.entry("dibit_uniform", p, p, n)(numbers.buffer_info()[0], draws.addresses[1], draws.max_rows)
    return numbers
