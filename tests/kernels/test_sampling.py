"""Draws in C++ against their definition in numpy, over ugly widths, ties and every filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dibit.engine import sampler
from dibit.engine.config import SamplingParams
from dibit.kernels import native, sampling_cpu
from dibit.kernels.contract import ContractError
from dibit.kernels.sampling_cpu import Draws, sample

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the C++ kernels")

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.01},
    {"temperature": 0.3, "top_p": 0.95, "top_k": 1000},
    {"temperature": 20.0, "top_p": 0.99},
    {"temperature": 1e-9},
    {"temperature": 100.0, "min_p": 0.5},
]


def defined(row: np.ndarray[Any, Any], params: SamplingParams, *, seed: int, count: int) -> int:
    ids, weights = sampler.kept(row, params)
    return int(ids[sampler.place(weights, sampler.uniform(seed, count))])


def prepared(params: SamplingParams, *, seed: int, count: int, rows: int = 1) -> Draws:
    draws = Draws(rows)
    for row in range(rows):
        draws.draw(
            row,
            temperature=params.temperature,
            min_p=params.min_p,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=seed,
        )
        draws.count(row, count + row)
    return draws


def drawn(scores: torch.Tensor, draws: Draws) -> list[int]:
    peaks, best = scores.max(dim=1)
    ids: list[int] = sample(scores, best, peaks, draws).tolist()
    return ids


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 129, 4097, 49152])
def test_the_definition_is_met(width: int, params: dict[str, Any]) -> None:
    chosen = SamplingParams(**params)
    generator = np.random.default_rng(width)
    for seed in (0, 1, 2**63 + 5, -7, 2**70 + 3):
        row = (generator.standard_normal(width) * 3).astype(np.float32)
        if seed == 1:
            row = np.round(row)  # ties
        if seed == 0 and width > 1:
            row[generator.integers(width, size=width // 2)] = -np.inf
            row[0] = 1.0
        for count in (0, 3):
            expected = defined(row, chosen, seed=seed, count=count)
            assert drawn(torch.from_numpy(row)[None], prepared(chosen, seed=seed, count=count)) == [expected]


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**127), 2**128 - 1), st.integers(0, 2**62))
def test_the_uniform_numbers_are_those_of_the_definition(seed: int, count: int) -> None:
    # 4096 equally likely ids: the id is the number's first twelve bits.
    scores = torch.zeros(1, 4096)
    expected = int(sampler.uniform(seed, count) * 4096)
    assert drawn(scores, prepared(SamplingParams(), seed=seed, count=count)) == [expected]


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_do_not_know_each_other(threads: int) -> None:
    before = native.threads()
    native.set_threads(threads)
    try:
        scores = torch.randn(9, 1003) * 4
        params = SamplingParams(top_p=0.8, top_k=40)
        together = drawn(scores, prepared(params, seed=5, count=10, rows=9))
        alone = [drawn(scores[r : r + 1], prepared(params, seed=5, count=10 + r))[0] for r in range(9)]
        assert together == alone
    finally:
        native.set_threads(before)


def test_greedy_and_broken_rows_get_the_best() -> None:
    scores = torch.randn(4, 300)
    scores[1, 7], scores[2, 5], scores[3] = float("nan"), float("inf"), float("-inf")
    draws = prepared(SamplingParams(), seed=1, count=0, rows=4)
    draws.greedy(0)
    best = torch.tensor([11, 7, 5, 0])
    assert sample(scores, best, scores.max(dim=1).values, draws).tolist() == [11, 7, 5, 0]


def test_what_does_not_fit_is_refused() -> None:
    draws = Draws(2)
    scores, best, peaks = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    with pytest.raises(ContractError, match="expected 1 to 2 rows"):
        sample(scores, best, peaks, draws)
    with pytest.raises(ContractError, match="best"):
        sample(scores[:2], best, peaks[:2], draws)
    with pytest.raises(ContractError, match="scores"):
        sample(scores[:2].double(), best[:2], peaks[:2], draws)
    assert sampling_cpu.sample(scores[:2], best[:2], peaks[:2], draws).tolist() == [0, 0]
