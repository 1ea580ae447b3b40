"""POST /v1/completions: kinds of prompts, echo, log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fakes import BOS, EOS, FakeRunner, solo_tokens
from server_harness import MODEL, Live, events, serving

HALF = pytest.approx(-0.6931, abs=1e-4)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


def test_a_completion(live: Live) -> None:
    done = live.openai().completions.create(model=MODEL, prompt="hello", temperature=0, max_tokens=6)
    assert done.object == "text_completion"
    assert done.id.startswith("cmpl-")
    assert done.choices[0].text == bytes(solo_tokens([BOS, *b"hello"], 6)).decode()
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is None
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 6)


def test_sixteen_tokens_unless_said_otherwise(live: Live) -> None:
    assert live.complete().json()["usage"]["completion_tokens"] == 16
    assert live.complete(max_tokens=None).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["ab", ["ab", "c"], [97, 98], [[97, 98], [99], [100, 101, 102]]])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_every_kind_of_prompt(live: Live, prompt: Any, n: int, way: str) -> None:
    ids: list[list[int]] = {
        "ab": [[BOS, *b"ab"]],
        "['ab', 'c']": [[BOS, *b"ab"], [BOS, *b"c"]],
        "[97, 98]": [[97, 98]],
    }.get(str(prompt)) or prompt
    ask = {"temperature": 0, "max_tokens": 5, "n": n, "stream": way == "streamed"}
    if way == "streamed":
        chunks = events(live.complete(prompt, **ask, stream_options={"include_usage": True}).text)
        assert chunks.pop() == "[DONE]"
        last = chunks.pop()
        assert last["choices"] == []
        texts = [""] * (len(ids) * n)
        for chunk in chunks:
            [choice] = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == len(texts)
        assert len(chunks) == 5 * len(texts)
        usage = last["usage"]
    else:
        whole = live.complete(prompt, **ask).json()
        assert [choice["index"] for choice in whole["choices"]] == list(range(len(ids) * n))
        texts = [choice["text"] for choice in whole["choices"]]
        usage = whole["usage"]
    assert texts == [bytes(solo_tokens(one, 5)).decode() for one in ids for _ in range(n)]
    assert usage["prompt_tokens"] == sum(map(len, ids))
    assert usage["completion_tokens"] == 5 * len(ids) * n


def test_log_likelihood_of_given_tokens(live: Live) -> None:
    """As evaluation harnesses ask: token ids, echo, log-probabilities, nothing or one token generated."""
    for max_tokens in (0, 1):
        ask = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
        done = live.complete([[97, 98, 99], [100, 101]], **ask).json()
        for choice, prompt in zip(done["choices"], ["abc", "de"], strict=True):
            logprobs = choice["logprobs"]
            assert choice["text"].startswith(prompt)
            assert "".join(logprobs["tokens"]) == choice["text"]
            assert len(choice["text"]) == len(prompt) + max_tokens
            assert logprobs["token_logprobs"] == [None] + [HALF] * (len(prompt) + max_tokens - 1)
            assert logprobs["text_offset"] == list(range(len(prompt) + max_tokens))
            assert logprobs["top_logprobs"][0] is None
            for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
                assert top[token] == HALF
        assert done["usage"]["completion_tokens"] == 2 * max_tokens


def test_offsets_and_names_where_tokens_are_not_characters(live: Live) -> None:
    done = live.complete("é<", echo=True, logprobs=0, max_tokens=2, temperature=0).json()["choices"][0]
    logprobs = done["logprobs"]
    assert logprobs["tokens"][:4] == ["<s>", "bytes:\\xc3", "bytes:\\xa9", "<"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 2, 3]
    assert done["text"][:2] == "é<"
    assert done["text"][2:] == "".join(logprobs["tokens"][4:])
    plain = live.complete("é<", logprobs=0, max_tokens=2, temperature=0).json()["choices"][0]
    assert plain["logprobs"]["text_offset"] == [0, 1]
    assert plain["logprobs"]["tokens"] == logprobs["tokens"][4:]


def test_echo(live: Live) -> None:
    done = live.complete(["ab", "c"], echo=True, max_tokens=2, temperature=0).json()
    assert [choice["text"][:-2] for choice in done["choices"]] == ["ab", "c"]
    assert done["choices"][0]["logprobs"] is None
    only = live.complete("ab", echo=True, max_tokens=0).json()["choices"][0]
    assert (only["text"], only["finish_reason"]) == ("ab", "length")


def test_a_streamed_echo_is_the_whole_one(live: Live) -> None:
    ask = {"echo": True, "logprobs": 2, "max_tokens": 4, "temperature": 0}
    whole = live.complete("ab", **ask).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events(live.complete("ab", **ask, stream=True).text)[:-1]]
    assert len(chunks) == 4
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for key, value in whole["logprobs"].items():
        assert [item for chunk in chunks for item in chunk["logprobs"][key]] == value


def test_a_prompt_longer_than_a_step() -> None:
    with serving(
        FakeRunner(num_blocks=256, max_model_len=200), engine={"max_batch_tokens": 16, "max_num_seqs": 4}
    ) as live:
        prompt = [97 + i % 26 for i in range(150)]
        done = live.complete(prompt, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
        assert len(done["tokens"]) == 151
        assert done["token_logprobs"] == [None] + [HALF] * 150


def test_log_likelihood_when_the_drawn_token_ends_the_text() -> None:
    """Harnesses leave out the last entry, that of the one token drawn: it must be there even if it does not show."""
    with serving(FakeRunner(reply=[EOS])) as live:
        ask = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
        [choice] = live.complete([[97, 98, 99]], **ask).json()["choices"]
        assert choice["text"] == "abc"
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["tokens"] == ["a", "b", "c", "</s>"]
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["top_logprobs"]) == 4


def test_a_batch_of_texts_to_write_on_as_harnesses_send_it(live: Live) -> None:
    stops = ["\n", "Question:", "</s>"]
    ask = {"temperature": 0, "max_tokens": 8, "stop": stops, "seed": 1234, "top_p": 0.9}
    done = live.complete([[97, 98], [99]], **ask).json()
    assert [choice["index"] for choice in done["choices"]] == [0, 1]
    assert [choice["text"] for choice in done["choices"]] == [
        bytes(solo_tokens(ids, 8)).decode() for ids in ([97, 98], [99])
    ]
