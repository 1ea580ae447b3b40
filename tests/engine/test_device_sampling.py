"""Draws by torch's ops, as a GPU makes them, held to the definition in engine/draw.py; here on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_request

from dibit.engine import device_sampling, sampler
from dibit.engine.config import SamplingParams
from dibit.engine.device_sampling import draw
from dibit.engine.draw import kept, place, uniform
from dibit.engine.errors import EngineFault
from dibit.engine.request import Request
from dibit.engine.sampler import sample, sample_on_device
from dibit.engine.step import Sampled
from dibit.kernels import native

FILTERS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"min_p": 0.01, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.7, "min_p": 0.001, "top_k": 400, "top_p": 0.95},
]


def drawn(scores: torch.Tensor, params: list[dict[str, Any]], numbers: list[float]) -> list[int]:
    asked = [SamplingParams(**p) for p in params]
    return draw(
        scores,
        temperature=[p.temperature for p in asked],
        min_p=[p.min_p for p in asked],
        top_k=[p.top_k for p in asked],
        top_p=[p.top_p for p in asked],
        numbers=numbers,
    ).tolist()


def defined(scores: torch.Tensor, params: dict[str, Any], number: float) -> int:
    ids, weights = kept(scores.numpy(), SamplingParams(**params))
    return int(ids[place(weights, number)])


@pytest.mark.parametrize("size", [1, 7, 1000, 50_257])
def test_tokens_of_the_definition(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampling, "SLICE_BYTES", 5 * 4 * size)
    scores = torch.randn(len(FILTERS), size, generator=torch.Generator().manual_seed(size)) * 3
    for turn in range(8):
        numbers = [uniform(row, turn) for row in range(len(FILTERS))]
        expected = [defined(row, p, u) for row, p, u in zip(scores, FILTERS, numbers, strict=True)]
        assert drawn(scores, FILTERS, numbers) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -50.0, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=40),
    st.sampled_from(FILTERS),
    st.sampled_from([0.0, 1e-12, 0.3, 0.77, 1 - 2.0**-53]),
)
def test_ties_and_impossible_tokens(row: list[float], params: dict[str, Any], number: float) -> None:
    """Of equal scores top_p takes the lower ids first, top_k takes all; a token of no weight is never drawn."""
    if max(row) == -math.inf:
        row[0] = 1.0
    scores = torch.tensor([row])
    [found] = drawn(scores, [params], [number])
    ids, weights = kept(scores[0].numpy(), SamplingParams(**params))
    assert found in ids[weights > 0]
    # Sums in another order move a border by their last bits.
    shares = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    if np.abs(shares - number).min() > 1e-9:
        assert found == ids[place(weights, number)]


def test_frequencies_follow_the_distribution() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, 1.5, 0.5]])
    count = 20_000
    numbers = [uniform(3, turn) for turn in range(count)]
    params = {"temperature": 0.8, "top_k": 4}
    tokens = drawn(scores.expand(count, -1), [params] * count, numbers)
    ids, weights = kept(scores[0].numpy(), SamplingParams(**params))
    expected = weights / weights.sum() * count
    counts = np.bincount(tokens, minlength=6)
    assert counts.sum() == counts[ids].sum()
    # Three degrees of freedom: 21.1 has a probability of 1e-4.
    assert float(((counts[ids] - expected) ** 2 / expected).sum()) < 21.1


def requests_of(count: int, **params: Any) -> list[Request]:
    return [make_request([1, 2, i], id=str(i), **params) for i in range(count)]


@pytest.mark.parametrize("body", ["numpy", "library"])
def test_requests_of_every_kind_beside_each_other(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if body == "library" and native.unavailable() is not None:
        pytest.skip("needs the C++ kernels")
    monkeypatch.setattr(sampler, "_has_library", lambda: body == "library")
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 0.7, "logprobs": 3},
        {"temperature": 1.0, "frequency_penalty": 0.4},
        {"temperature": 0.0, "logit_bias": {5: 30.0}},
        {"temperature": 0.5, "min_p": 0.1, "top_k": 20},
    ]
    requests = [make_request([1, 2], id=str(i), **params) for i, params in enumerate(kinds)]
    logits = torch.randn(len(kinds), 300, generator=torch.Generator().manual_seed(9)) * 2
    assert sample_on_device(logits, requests) == sample(logits, requests)


def test_broken_rows_fail_alone() -> None:
    logits = torch.randn(4, 50)
    logits[0, 3], logits[1, 4], logits[2] = math.nan, math.inf, -math.inf
    found = sample_on_device(logits, requests_of(4, temperature=0.8, top_p=0.9))
    assert [type(result) for result in found] == [EngineFault, EngineFault, EngineFault, Sampled]
