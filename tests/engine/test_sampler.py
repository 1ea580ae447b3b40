"""The sampler against a plain reference, against transformers, and against its own promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dibit.engine import sampler
from dibit.engine.config import SamplingParams
from dibit.engine.draw import kept, uniform
from dibit.engine.errors import EngineFault
from dibit.engine.request import Request, TokenLogprob
from dibit.engine.sampler import _highest_on_device, _known, prompt_logprobs, sample
from dibit.engine.step import Sampled
from dibit.kernels import native


def request(
    *,
    prompt: tuple[int, ...] = (0,),
    output: tuple[int, ...] = (),
    seed: int = 0,
    eos: tuple[int, ...] = (),
    **params: Any,
) -> Request:
    return Request(
        id=f"r{seed}",
        prompt_ids=prompt,
        params=SamplingParams(**params),
        max_tokens=100,
        seed=seed,
        eos_ids=frozenset(eos),
        token_ids=[*prompt, *output],
    )


@pytest.fixture(autouse=True, params=["library", "numpy"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every promise is kept by the C++ body and by the one it is defined by."""
    with_library = request.param == "library"
    if with_library and native.unavailable() is not None:
        pytest.skip("needs the C++ kernels")
    monkeypatch.setattr(sampler, "_has_library", lambda: with_library)
    return str(request.param)


def drawn(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    tokens = []
    for result in sample(logits, requests):
        assert isinstance(result, Sampled), result
        tokens.append(result.token_id)
    return tokens


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_agrees_with_transformers(penalty: float) -> None:
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    tokens = (3, 3, 7, 1, 12)
    for seed in range(20):
        logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone()).argmax().item()
        penalized = request(prompt=tokens[:2], output=tokens[2:], temperature=0, repetition_penalty=penalty)
        assert drawn(logits, [penalized]) == [expected]


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.0]])

    def best(output: tuple[int, ...], **penalties: float) -> int:
        return drawn(logits, [request(prompt=(0, 0, 0), output=output, temperature=0, **penalties)])[0]

    assert best((), presence_penalty=2, frequency_penalty=2) == 0
    assert best((0,), presence_penalty=0.75) == 1
    assert best((0,), presence_penalty=0.25) == 0
    assert best((0, 0), presence_penalty=0.4) == 0
    assert best((0, 0), frequency_penalty=0.4) == 1
    assert best((0, 1, 1), presence_penalty=0.6, frequency_penalty=0.3) == 0
    assert best((0, 0, 1, 1), presence_penalty=0.6, frequency_penalty=0.3) == 2
    assert best((3, 3), frequency_penalty=-1.5) == 3


def test_bias_forces_and_forbids() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    rows = logits.repeat(3, 1)
    forced = request(temperature=0, logit_bias={2: 100.0})
    barred = request(temperature=0, logit_bias={0: -100.0})
    assert drawn(rows, [forced, barred, request(temperature=0)]) == [2, 1, 0]
    assert drawn(rows, [request(seed=s, logit_bias={2: 100.0}) for s in range(3)]) == [2, 2, 2]
    assert torch.equal(rows, logits.repeat(3, 1)), "the caller's logits were changed"


def test_end_tokens_are_banned_until_min_tokens() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 2.0]])
    for output, expected in (((), 3), ((3,), 3), ((3, 3), 1)):
        row = request(output=output, temperature=0, min_tokens=2, stop_token_ids=(2,), eos=(1, 99))
        assert drawn(logits, [row]) == [expected]


def test_greedy_takes_the_lowest_id_on_ties_whatever_else_is_asked() -> None:
    logits = torch.tensor([[0.0, 4.0, 4.0, -1.0]] * 4)
    rows = [
        request(temperature=0),
        request(temperature=0, top_k=1, top_p=0.1, min_p=1.0),
        request(temperature=0, logprobs=2),
        request(temperature=0, logit_bias={0: 1.0}),
    ]
    assert drawn(logits, rows) == [1, 1, 1, 1]


def test_the_path_for_devices_and_known_peaks_choose_alike() -> None:
    logits = torch.randint(-3, 3, (30, 50), generator=torch.Generator().manual_seed(6)).float()
    logits[4, 7], logits[5, 0], logits[6] = math.nan, math.inf, -math.inf
    rows = [request(seed=s, temperature=0) for s in range(30)]
    chosen = _highest_on_device(logits)
    expected, found = sample(logits, rows), _known(chosen.ids, chosen.peaks, rows)
    assert [str(f) for f in found] == [str(e) for e in expected]
    assert sum(isinstance(f, EngineFault) for f in found) == 3
    known = sample(logits, rows, highest=_highest_on_device(logits))
    assert [str(k) for k in known] == [str(e) for e in expected]


def chi_square(tokens: list[int], probabilities: np.ndarray[Any, Any]) -> float:
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    likely = probabilities > 0
    expected = probabilities[likely] * len(tokens)
    return float(((counts[likely] - expected) ** 2 / expected).sum())


# 99.9 % quantiles of chi-square with 7 and 3 degrees of freedom.
@pytest.mark.parametrize(("params", "bound"), [({}, 24.3), ({"temperature": 2.0}, 24.3), ({"top_k": 4}, 16.3)], ids=str)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_frequencies_follow_the_distribution(params: dict[str, Any], bound: float, varied: str) -> None:
    draws = 4000
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.9, -0.4, -2.0, 0.5])
    ids, weights = kept(logits.numpy(), SamplingParams(**params))
    probabilities = np.zeros(8)
    probabilities[ids] = weights / weights.sum()
    if varied == "seed":
        rows = [request(seed=s, **params) for s in range(draws)]
    else:
        rows = [request(seed=11, output=(0,) * n, **params) for n in range(draws)]
    assert chi_square(drawn(logits.repeat(draws, 1), rows), probabilities) < bound


def test_draws_over_many_blocks_follow_the_distribution() -> None:
    size, groups = 1000, 8
    logits = torch.randn(size, generator=torch.Generator().manual_seed(2))
    mass = torch.softmax(logits.double(), 0).reshape(groups, -1).sum(1).numpy()
    tokens = drawn(logits.repeat(2000, 1), [request(seed=s) for s in range(2000)])
    assert chi_square([t * groups // size for t in tokens], mass) < 24.3


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 700), -math.inf)
    logits[:, 130], logits[:, 131], logits[:, 699] = 0.0, 0.0, 0.0
    tokens = drawn(logits, [request(seed=s) for s in range(500)])
    assert set(tokens) == {130, 131, 699}


def test_a_tiny_temperature_is_greedy_and_a_large_one_nearly_uniform() -> None:
    logits = torch.tensor([[3.0, 3.001, -3e38, 1.0]] * 50)
    assert set(drawn(logits, [request(seed=s, temperature=1e-30) for s in range(50)])) == {1}
    assert set(drawn(logits, [request(seed=s, temperature=100.0) for s in range(50)])) == {0, 1, 3}


def test_the_uniform_numbers_are_pinned() -> None:
    # Same seed, same text, also after an upgrade: these values may never change.
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0)] == [
        0.011546754286331562,
        0.5023796042735054,
        0.3035680343067586,
    ]
    numbers = [uniform(seed, n) for seed in (-5, 0, 2**63, 2**200 + 3) for n in range(250)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= n < 1 for n in numbers)
    assert abs(np.mean(numbers) - 0.5) < 0.03


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 0, "logprobs": 3},
        {"top_p": 0.9, "logprobs": 0},
        {"top_k": 7, "presence_penalty": 1.0},
        {"min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 5},
    ]
    logits = torch.randn(12, 997, generator=torch.Generator().manual_seed(3)) * 3
    rows = [request(seed=i, output=(i, 5) * (i % 3), eos=(4,), **kinds[i % len(kinds)]) for i in range(12)]
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    chosen = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=20))
    assert sample(logits[chosen], [rows[i] for i in chosen]) == [alone[i] for i in chosen]
    every_other = torch.stack([logits, -logits], dim=2)[:, :, 0]
    assert not every_other.is_contiguous()
    assert sample(every_other, rows) == alone


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 0, "logprobs": 1}, {}, {"logit_bias": {0: 1.0}}], ids=str
)
def test_a_broken_row_fails_alone(params: dict[str, Any]) -> None:
    logits = torch.zeros(5, 9)
    logits[:, 6] = 50.0
    logits[1, 2] = math.nan
    logits[2] = -math.inf
    logits[3, 8] = math.inf
    results = sample(logits, [request(seed=s, **params) for s in range(5)])
    assert [getattr(r, "token_id", None) for r in results] == [6, None, None, None, 6]
    for result, what in zip(results[1:4], ("NaN", "no finite value", r"\+inf"), strict=True):
        assert isinstance(result, EngineFault)
        with pytest.raises(EngineFault, match=f"request r.*{what}"):
            raise result


def test_ids_the_logits_do_not_have_fail_their_row_alone() -> None:
    rows = [request(logit_bias={9: 1.0}), request(temperature=0, repetition_penalty=2.0, output=(9,)), request(seed=2)]
    bias, penalty, fine = sample(torch.tensor([[0.0, 50.0]] * 3), rows)
    assert isinstance(bias, IndexError)
    assert isinstance(penalty, IndexError)
    assert fine == Sampled(1)


def test_a_ban_that_leaves_nothing_fails_its_row_alone() -> None:
    logits = torch.tensor([[1.0, -math.inf], [1.0, 0.0]])
    rows = [request(min_tokens=1, eos=(0,), temperature=0), request(min_tokens=1, eos=(0,), temperature=0)]
    fault, token = sample(logits, rows)
    assert isinstance(fault, EngineFault)
    assert token == Sampled(1)


def test_logprobs_are_of_the_untouched_distribution() -> None:
    logits = torch.randn(40, 1501, generator=torch.Generator().manual_seed(4)) * 4
    expected = torch.log_softmax(logits.double(), -1)
    rows = [
        request(seed=s, logprobs=s % 6, temperature=5.0, logit_bias={3: 4.0}, output=(1, 2), frequency_penalty=1.0)
        for s in range(40)
    ]
    outside = 0
    for row, result, asked in zip(expected, sample(logits, rows), rows, strict=True):
        assert isinstance(result, Sampled)
        found = result.logprob
        assert found is not None
        assert found.token_id == result.token_id
        assert found.logprob == pytest.approx(row[result.token_id].item(), abs=1e-5)
        assert found.rank == 1 + int((row > row[result.token_id]).sum())
        best = row.topk(asked.params.logprobs or 0)
        assert [i for i, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        outside += found.token_id not in dict(found.top)
    assert outside > 5


def test_top_logprobs_with_ties_take_lower_ids_first() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, 2500] = 1.0
    (result,) = sample(logits, [request(temperature=0, logprobs=4)])
    assert isinstance(result, Sampled)
    assert result.logprob is not None
    assert [i for i, _ in result.logprob.top] == [2500, 0, 1, 2]
    (few,) = sample(torch.zeros(1, 3), [request(temperature=0, logprobs=20)])
    assert isinstance(few, Sampled)
    assert few.logprob is not None
    assert [i for i, _ in few.logprob.top] == [0, 1, 2]


def test_prompt_logprobs_match_log_softmax() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(5)) * 3
    targets = [0, 299, 5, 5, 17, 100, int(logits[6].argmax())]
    expected = torch.log_softmax(logits.double(), -1)
    found = prompt_logprobs(logits, targets, 3)
    assert [f.token_id for f in found] == targets
    assert [f.logprob for f in found] == pytest.approx([expected[i, t].item() for i, t in enumerate(targets)], abs=1e-5)
    assert found[6].rank == 1
    assert all(len(f.top) == 3 for f in found)
    assert prompt_logprobs(logits[2:4], targets[2:4], 3) == found[2:4], "a chunk border changed the figures"
    assert prompt_logprobs(torch.zeros(1, 4), [2], 0) == (TokenLogprob(2, pytest.approx(-math.log(4)), 1),)


def test_broken_prompt_logits_are_refused() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 1] = math.nan
    with pytest.raises(EngineFault, match=r"row 1 .*NaN"):
        prompt_logprobs(logits, [0, 0, 0], 0)
