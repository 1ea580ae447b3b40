"""Log-probabilities of given tokens against log_softmax in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from dibit.kernels import native
from dibit.kernels.contract import ContractError

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="the C++ library is not built")

from dibit.kernels.logprob_cpu import logprobs  # noqa: E402

# Below, at and above a vector, a piece of sums, and a vocabulary.
WIDTHS = (1, 7, 8, 17, 127, 128, 129, 1000, 49152)


@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_ranks_are_those_of_log_softmax(width: int, isa: str) -> None:
    scores = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * 6
    scores[1] = 3.25
    ids = torch.tensor([0, width // 2, width - 1, int(scores[3].argmax()), int(scores[4].argmin())])
    found, ranks, peaks = logprobs(scores, ids)
    wanted = torch.log_softmax(scores.double(), dim=1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    own = scores.gather(1, ids[:, None])
    assert ranks.tolist() == (1 + (scores > own).sum(dim=1)).tolist()
    assert ranks[1] == 1
    assert torch.equal(peaks, scores.amax(dim=1))


def test_a_row_depends_on_nothing_else(isa: str) -> None:
    scores = torch.randn(9, 333)
    ids = torch.arange(9)
    together = logprobs(scores, ids)[0]
    native.set_threads(1)
    apart = [float(logprobs(scores[r : r + 1], ids[r : r + 1])[0]) for r in range(9)]
    assert together.tolist() == apart


def test_minus_infinity_is_a_score_like_any_other(isa: str) -> None:
    scores = torch.full((2, 40), -torch.inf)
    scores[:, 3], scores[:, 5] = 1.0, 1.0
    found, ranks, peaks = logprobs(scores, torch.tensor([3, 0]))
    assert found.tolist() == [pytest.approx(-0.6931471805599453, abs=1e-6), -torch.inf]
    assert ranks.tolist() == [1, 3]
    assert peaks.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("place", [0, 15, 16, 40])
def test_a_score_that_is_not_a_number_shows(place: int, isa: str) -> None:
    scores = torch.zeros(3, 41)
    scores[1, place] = torch.nan
    scores[2, place] = torch.inf
    peaks = logprobs(scores, torch.zeros(3, dtype=torch.int64))[2]
    assert peaks[0] == 0.0
    assert peaks[1].isnan()
    assert peaks[2] == torch.inf


@pytest.mark.parametrize("ids", [[0, 8], [-1, 0]])
def test_an_id_outside_is_refused(ids: list[int]) -> None:
    with pytest.raises(ContractError, match="rows have 8 scores"):
        logprobs(torch.zeros(2, 8), torch.tensor(ids))


def test_shapes_are_checked() -> None:
    with pytest.raises(ContractError, match="ids"):
        logprobs(torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ContractError, match="no columns"):
        logprobs(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
