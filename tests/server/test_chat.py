"""POST /v1/chat/completions through the openai client and on the wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dibit.server.schemas import ChatRequest
from fakes import EOS, FakeRunner
from server_harness import MODEL, Live, events, serving

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


def test_an_answer(live: Live) -> None:
    answer = live.openai().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=7, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content or "") == 7
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    prompt = len("user: hi\nassistant: ") + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 7)
    assert answer.usage.total_tokens == prompt + 7


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(live: Live, n: int) -> None:
    client = live.openai()
    settings = {"model": MODEL, "messages": HELLO, "max_tokens": 9, "seed": 5, "n": n}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9 * n
    assert all(chunk.usage is None for chunk in chunks[:-1])
    by_index: dict[int, list[object]] = {i: [] for i in range(n)}
    for chunk in chunks[:-1]:
        assert len(chunk.choices) == 1
        by_index[chunk.choices[0].index].append(chunk.choices[0])
    for index, choices in by_index.items():
        assert len(choices) == 9, "one chunk per token"
        assert [c.delta.role for c in choices] == ["assistant"] + [None] * 8
        assert [c.finish_reason for c in choices] == [None] * 8 + ["length"]
        assert "".join(c.delta.content for c in choices) == whole.choices[index].message.content


def test_choice_i_draws_with_seed_plus_i(live: Live) -> None:
    client = live.openai()

    def texts(**settings: object) -> list[str | None]:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, **settings)
        return [choice.message.content for choice in answer.choices]

    several = texts(n=3, seed=40)
    assert several == [*texts(seed=40), *texts(seed=41), *texts(seed=42)]
    assert len(set(several)) == 3
    assert texts() != texts(), "without a seed, draws differ"


def test_usage_counts_a_prompt_once_and_its_cached_tokens(live: Live) -> None:
    ask = {"text": "a prompt that is long enough to be cached", "max_tokens": 2, "n": 2}
    first, second = (live.chat(**ask).json()["usage"] for _ in range(2))
    assert first["prompt_tokens"] == len("user: a prompt that is long enough to be cached\nassistant: ") + 1
    assert first["completion_tokens"] == 4
    assert second["prompt_tokens_details"]["cached_tokens"] > 40
    assert second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]


def test_usage_on_every_chunk(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(live.chat(max_tokens=3, stream=True, stream_options=options).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]] == [1, 2, 3, 3]


def test_messages_of_every_role_reach_the_template(live: Live) -> None:
    seen: list[bytes] = []
    live.runner.on_execute = lambda step: seen.append(bytes(step.chunks[0].request.prompt_ids[1:]))
    try:
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "eve"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "d"},
        ]
        assert live.chat(messages=messages, max_tokens=1).status_code == 200
        assert live.chat(messages=messages[:3], max_tokens=1, continue_final_message=True).status_code == 200
        assert live.chat(messages=messages[:2], max_tokens=1, add_generation_prompt=False).status_code == 200
    finally:
        live.runner.on_execute = None
    turns = b"system: be brief\nuser: a\nb\n"
    assert list(dict.fromkeys(seen)) == [
        turns + b"assistant: c\nuser: d\nassistant: ",
        turns + b"assistant: c",
        turns,
    ]


def test_max_completion_tokens_is_the_limit(live: Live) -> None:
    assert live.chat(max_completion_tokens=4).json()["usage"]["completion_tokens"] == 4
    assert live.chat(max_completion_tokens=4, max_tokens=4).json()["usage"]["completion_tokens"] == 4


def test_without_a_limit_the_context_is_filled(live: Live) -> None:
    usage = live.chat().json()["usage"]
    assert usage["total_tokens"] == live.engine.max_model_len


def test_neutral_values_and_labels_are_taken(live: Live) -> None:
    nothing = {name: None for name in ChatRequest.model_fields if name not in ("model", "messages")}
    neutral = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "modalities": ["text"], "store": False, "service_tier": "auto", "best_of": 1, "suffix": "", "audio": None,
        "user": "u-1", "metadata": {"a": "b"}, "ignore_eos": True, "repetition_penalty": 1.0, "min_tokens": 0,
        "logit_bias": {}, "stop": [], "top_k": -1, "min_p": 0, "use_beam_search": False, "max_tokens": 2,
    }  # fmt: skip
    assert live.chat(**{**nothing, **neutral}).status_code == 200


def test_logprobs(live: Live) -> None:
    answer = live.openai().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.logprob == pytest.approx(-0.6931, abs=1e-4)
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
    plain = live.chat(max_tokens=3, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[], [], []]
    streamed = events(live.chat(max_tokens=3, logprobs=True, stream=True, temperature=0).text)[:-1]
    assert [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in streamed] == [1, 1, 1]


def test_ends_of_an_answer() -> None:
    with serving(FakeRunner(num_blocks=256, max_model_len=256, reply=[*b"one two", EOS])) as live:
        answer = live.chat(max_tokens=50).json()
        assert answer["choices"][0]["message"]["content"] == "one two"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 8

        def text(**fields: object) -> str:
            choice = live.chat(max_tokens=50, **fields).json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            content: str = choice["message"]["content"]
            return content

        assert text(stop=" t") == "one"
        assert text(stop=["wo", "x"], include_stop_str_in_output=True) == "one two"
        assert text(stop_token_ids=[ord("w")]) in ("one t", "one tw")
        ignored = live.chat(max_tokens=20, ignore_eos=True).json()
        assert ignored["usage"]["completion_tokens"] == 20
        assert ignored["choices"][0]["finish_reason"] == "length"

        chunks = events(live.chat(stream=True, stop="two").text)
        assert chunks[-1] == "[DONE]"
        deltas = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]]
        assert "".join(deltas) == "one "
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 6 + ["stop"]
