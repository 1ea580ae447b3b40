"""Admission: what is refused before it reaches the engine, and what the rest becomes."""

from __future__ import annotations

from typing import Any

import pytest

from dibit.engine.admission import Admission
from dibit.engine.config import SamplingParams
from dibit.engine.errors import ContextLengthError, RequestError

ADMISSION = Admission(max_model_len=20, vocab_size=10)


def test_a_request_is_completed() -> None:
    add = ADMISSION.admit("a", [1, 2, 3], SamplingParams(), cache_salt="s", stream=7)
    assert (add.prompt_ids, add.max_tokens, add.cache_salt, add.stream) == ((1, 2, 3), 17, "s", 7)
    assert 0 <= add.seed < 2**63
    assert ADMISSION.admit("a", [1], SamplingParams(seed=-5, max_tokens=19)).seed == -5


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logit_bias": {10: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [3, 10]}, "stop_token_ids"),
    ],
    ids=str,
)
def test_ids_outside_the_vocabulary_are_refused(params: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match="0 to 9") as caught:
        ADMISSION.admit("a", [1], SamplingParams(**params))
    assert caught.value.param == param
    ADMISSION.admit("a", [1], SamplingParams(logit_bias={0: 1.0, 9: 1.0}, stop_token_ids=[0, 9]))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 2**2000])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match="seed is") as caught:
        SamplingParams(seed=seed)
    assert caught.value.param == "seed"


def test_text_that_no_message_carries_is_refused() -> None:
    with pytest.raises(RequestError, match="surrogate at character 2") as caught:
        ADMISSION.admit("a", [1], SamplingParams(stop=("ok", "no\ud800")))
    assert caught.value.param == "stop"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([1, 10], {}, "token id 10; this model's ids are 0 to 9"),
        ([1] * 19, {"min_tokens": 2}, "only 1 tokens fit"),
    ],
)
def test_prompts_that_cannot_be_served(prompt: list[int], params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ADMISSION.admit("a", prompt, SamplingParams(**params))


@pytest.mark.parametrize(("count", "max_tokens"), [(20, None), (15, 6)])
def test_what_does_not_fit_into_the_context(count: int, max_tokens: int | None) -> None:
    with pytest.raises(ContextLengthError, match="context length is 20 tokens"):
        ADMISSION.admit("a", [1] * count, SamplingParams(max_tokens=max_tokens))
