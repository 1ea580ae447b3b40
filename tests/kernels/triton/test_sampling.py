"""Draws by the Triton kernels, in the interpreter, against a sort in float64 and against the C++ library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import make_request
from torch import Tensor

from dibit.engine import device_sampling
from dibit.engine.sampler import sample as sample_on_host
from dibit.engine.sampler import sample_on_device
from dibit.kernels import native
from dibit.kernels.contract import ContractError
from dibit.kernels.sampling_cpu import Draws, sample, uniforms
from dibit.kernels.triton import sampling
from dibit.kernels.triton.sampling import draw

Filters = tuple[float, float, int, float]  # temperature, min_p, top_k, top_p
OPEN: Filters = (1.0, 0.0, 0, 1.0)
FILTERS: list[Filters] = [
    OPEN,
    (0.3, 0.02, 0, 1.0),
    (1.0, 0.0, 1, 1.0),
    (1.0, 0.0, 10**6, 0.9),
    (2.0, 0.0, 0, 1e-9),
    (1.7, 0.001, 40, 0.95),
]
NEAR_BORDER = 1e-6


def drawn(scores: Tensor, filters: Sequence[Filters], numbers: Sequence[float]) -> list[int]:
    settings = torch.tensor([*zip(*filters, strict=True), numbers], dtype=torch.float64)
    top_k, top_p = any(f[2] > 0 for f in filters), any(f[3] < 1.0 for f in filters)
    ids: list[int] = draw(scores, settings, top_k=top_k, top_p=top_p).tolist()
    return ids


def defined(scores: Tensor, filters: Filters, number: float) -> set[int]:
    """The token that a sort in float64 gives, and its neighbours where the number is near a border."""
    temperature, min_p, top_k, top_p = filters
    s = scores.double().numpy()
    w = np.exp((s - s.max()) / temperature)
    w[w < min_p] = 0.0
    left = int((w > 0).sum())
    if 0 < top_k < left:
        w[s < np.sort(s)[-top_k]] = 0.0
    if top_p < 1.0:
        order = np.argsort(-w, kind="stable")
        w[order[np.searchsorted(np.cumsum(w[order]), top_p * w.sum()) + 1 :]] = 0.0
    ids = np.flatnonzero(w)
    ends = np.cumsum(w[ids]) / w.sum()
    places = np.searchsorted(ends, [number - NEAR_BORDER, number, number + NEAR_BORDER], side="right")
    return {int(ids[min(place, len(ids) - 1)]) for place in places}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and several programs a row, of rows the interpreter has done in seconds."""
    monkeypatch.setattr(sampling, "BLOCK", 128)
    monkeypatch.setattr(sampling, "TILE", 64)


@pytest.mark.parametrize("size", [1, 201])
def test_tokens_of_the_definition(size: int, small_blocks: None) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(len(FILTERS), size, generator=generator) * 3
    numbers = torch.rand(len(FILTERS), generator=generator, dtype=torch.float64).tolist()
    for token, row, filters, number in zip(drawn(scores, FILTERS, numbers), scores, FILTERS, numbers, strict=True):
        assert token in defined(row, filters, number), filters


def test_tokens_of_the_library(small_blocks: None) -> None:
    if native.unavailable() is not None:
        pytest.skip("needs the C++ kernels")
    # Coarse scores: ties at every bar.
    scores = (torch.randn(len(FILTERS), 201, generator=torch.Generator().manual_seed(5)) * 4).round() / 2
    draws = Draws(len(FILTERS))
    for row, (temperature, min_p, top_k, top_p) in enumerate(FILTERS):
        draws.draw(row, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=row)
    peaks, best = scores.max(1)
    expected = sample(scores, best, peaks, draws).tolist()
    assert drawn(scores, FILTERS, uniforms(draws).tolist()) == expected


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-53])
def test_of_ties_top_p_takes_the_lower_ids_and_top_k_all(number: float) -> None:
    scores = torch.tensor([[0.0, 2.0, -math.inf, 2.0, 2.0, 2.0, -1.0, -math.inf]]).expand(3, -1).contiguous()
    filters = [(1.0, 0.0, 0, 0.4), (1.0, 0.0, 2, 1.0), (1.0, 0.0, 2, 0.7)]
    ranks = [2, 4, 3]
    likeliest = [1, 3, 4, 5]
    assert drawn(scores, filters, [number] * 3) == [likeliest[math.floor(number * rank)] for rank in ranks]


def test_ties_that_top_p_leaves_out_do_not_count_before_a_likelier_token(small_blocks: None) -> None:
    scores = torch.zeros(2, 250)
    scores[:, 240] = 1.0
    # 0.8 of the whole: the last token in question is likelier than all others, and 199 of these stay.
    filters = [(1.0, 0.0, 0, 0.8)] * 2
    assert drawn(scores, filters, [0.995, 0.98]) == [240, 197]


@pytest.mark.parametrize(("filters", "left"), [((1.0, 0.0, 3, 1.0), [1, 3, 4]), ((1.0, 1.0, 0, 1.0), [1, 4])])
def test_what_is_at_the_bar_stays_where_no_row_has_top_p(filters: Filters, left: list[int]) -> None:
    scores = torch.tensor([[0.0, 2.0, -1.0, 1.9, 2.0, 0.5]]).expand(8, -1).contiguous()
    assert set(drawn(scores, [filters] * 8, [(i + 0.5) / 8 for i in range(8)])) == set(left)


def test_impossible_tokens_are_never_drawn() -> None:
    scores = torch.full((2, 1100), -math.inf)
    scores[:, 1050] = -4.0
    assert drawn(scores, [OPEN, (1e-6, 0.0, 5, 0.999)], [1 - 2.0**-53, 0.0]) == [1050, 1050]


def test_a_broken_row_gets_some_id_and_leaves_the_others_alone() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    scores[0, 3], scores[1, 4], scores[2] = math.nan, math.inf, -math.inf
    filters = [(0.8, 0.0, 20, 0.9)] * 4
    found = drawn(scores, filters, [0.4] * 4)
    assert all(0 <= token < 50 for token in found)
    assert found[3:] == drawn(scores[3:].contiguous(), filters[3:], [0.4])


def test_a_row_does_not_depend_on_what_others_ask() -> None:
    scores = torch.randn(2, 300, generator=torch.Generator().manual_seed(3))
    together = drawn(scores, [(0.9, 0.0, 0, 1.0), (1.0, 0.1, 30, 0.8)], [0.61, 0.37])
    assert together[:1] == drawn(scores[:1].contiguous(), [(0.9, 0.0, 0, 1.0)], [0.61])


def test_frequencies_follow_the_distribution() -> None:
    count = 24
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5]).expand(count, -1).contiguous()
    # Evenly spread numbers: each token comes as often as its share, to within one.
    tokens = drawn(scores, [OPEN] * count, [(i + 0.5) / count for i in range(count)])
    counts = np.bincount(tokens, minlength=5)
    assert np.abs(counts - torch.softmax(scores[0], 0).numpy() * count).max() <= 1.0


def test_the_engine_draws_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.unavailable() is not None:
        pytest.skip("needs the C++ kernels")
    monkeypatch.delattr(device_sampling, "_drawn")
    monkeypatch.setattr(device_sampling, "SLICE_BYTES", 2 * 4 * 90)
    kinds = [{"temperature": 0.0}, {"top_p": 0.9}, {"temperature": 0.5, "top_k": 20}, {"min_p": 0.1}]
    requests = [make_request([1, 2], id=str(i), **params) for i, params in enumerate(kinds)]
    logits = torch.randn(len(kinds), 90, generator=torch.Generator().manual_seed(9)) * 2
    assert sample_on_device(logits, requests) == sample_on_host(logits, requests)


def test_warming_up_launches_every_kernel_that_a_draw_may_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(scores: Tensor, settings: Tensor, *, top_k: bool, top_p: bool) -> Tensor:
        asked.append((top_k, top_p))
        return draw(scores, settings, top_k=top_k, top_p=top_p)

    monkeypatch.setattr(sampling, "draw", record)
    device_sampling.warm_up(torch.zeros(1, 10))
    assert sorted(asked) == [(False, False), (False, True), (True, False), (True, True)]


def test_what_cannot_be_drawn_from_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.zeros(5, 2, dtype=torch.float64)
    with pytest.raises(ContractError, match=r"expected \[5, 3\]"):
        draw(torch.zeros(3, 4), settings, top_k=False, top_p=False)
    monkeypatch.setattr(sampling, "MAX_DRAWN_COLUMNS", 3)
    with pytest.raises(ContractError, match="rows of 4 scores; 1 to 3"):
        draw(torch.zeros(2, 4), settings, top_k=False, top_p=False)
    assert draw(torch.zeros(0, 2), settings[:, :0], top_k=True, top_p=True).shape == (0,)
