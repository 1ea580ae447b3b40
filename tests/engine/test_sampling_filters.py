"""What temperature, min_p, top_k and top_p keep: against their definitions and against transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dibit.engine.config import SamplingParams
from dibit.engine.draw import kept


def reference_kept(scores: list[float], params: SamplingParams) -> dict[int, float]:
    """Filters one after the other on a dict of probabilities, as their definitions read."""
    peak = max(scores)
    weights = {i: math.exp((s - peak) / params.temperature) for i, s in enumerate(scores)}
    if params.min_p > 0:
        weights = {i: w for i, w in weights.items() if w >= params.min_p}
    if 0 < params.top_k < len(weights):
        least = sorted((scores[i] for i in weights), reverse=True)[params.top_k - 1]
        weights = {i: w for i, w in weights.items() if scores[i] >= least}
    if params.top_p < 1:
        total, held, nucleus = sum(weights.values()), 0.0, {}
        for i in sorted(weights, key=lambda i: (-weights[i], i)):
            nucleus[i] = weights[i]
            held += weights[i]
            if held >= params.top_p * total:
                break
        weights = nucleus
    return {i: weights[i] for i in sorted(weights)}


# Quarters, so that ties happen often; their exponentials lie far enough apart to agree in float32 and float64.
scores_with_ties = st.lists(
    st.integers(-24, 24).map(lambda n: n / 4) | st.just(-math.inf), min_size=1, max_size=40
).filter(lambda scores: max(scores) > -math.inf)


@settings(deadline=None, max_examples=300)
@given(
    scores=scores_with_ties,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 3.0]),
    top_k=st.integers(-1, 45),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.613, 0.1, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.0713, 0.5, 1.0]),
)
def test_filters_keep_what_the_reference_keeps(
    scores: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, weights = kept(np.array(scores, dtype=np.float32), params)
    expected = reference_kept(scores, params)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(weights, list(expected.values()), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 3000},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.01, "top_k": 500, "top_p": 0.8},
        {"temperature": 0.3, "top_k": 500, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1023, 1025, 50_257])
def test_filters_on_a_whole_vocabulary(params: dict[str, Any], size: int) -> None:
    scores = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    ids, _ = kept(scores, SamplingParams(**params))
    assert ids.tolist() == list(reference_kept([float(s) for s in scores], SamplingParams(**params)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [("TemperatureLogitsWarper", 0.7)]),
        ({"top_k": 5}, [("TopKLogitsWarper", 5)]),
        ({"top_p": 0.8}, [("TopPLogitsWarper", 0.8)]),
        ({"min_p": 0.2}, [("MinPLogitsWarper", 0.2)]),
        (
            {"temperature": 1.3, "min_p": 0.02, "top_k": 9, "top_p": 0.7},
            [
                ("TemperatureLogitsWarper", 1.3),
                ("MinPLogitsWarper", 0.02),
                ("TopKLogitsWarper", 9),
                ("TopPLogitsWarper", 0.7),
            ],
        ),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else None,
)
def test_filters_agree_with_transformers(ours: dict[str, Any], theirs: list[tuple[str, float]]) -> None:
    from transformers import generation

    logits = torch.randn(20, 67, generator=torch.Generator().manual_seed(1)) * 2
    warped = logits
    for name, value in theirs:
        warped = getattr(generation, name)(value)(None, warped)
    expected = torch.softmax(warped, -1)
    for row, probabilities in zip(logits.numpy(), expected, strict=True):
        ids, weights = kept(row, SamplingParams(**ours))
        assert ids.tolist() == probabilities.nonzero().flatten().tolist()
        torch.testing.assert_close(
            torch.from_numpy(weights / weights.sum()), probabilities[torch.from_numpy(ids)], rtol=1e-5, atol=1e-7
        )
