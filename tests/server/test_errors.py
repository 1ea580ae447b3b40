"""Every way a request can be wrong, and what the client is told; nothing the client sends is a server error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dibit.engine.errors import CheckpointError, EngineDead, EngineFault
from dibit.server.errors import ApiError, describe
from dibit.server.schemas import MAX_MESSAGES, UNSUPPORTED, ChatRequest, CompletionRequest
from dibit.server.validation import parse
from fakes import FakeRunner
from server_harness import CHAT, COMPLETIONS, MODEL, Live, serving


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(FakeRunner(num_blocks=256, max_model_len=64), max_body_bytes=20_000, max_choices=16) as live:
        yield live


def check(response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" or status >= 500
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert response.headers["content-type"] == "application/json"
    message: str = error["message"]
    return message


USER = {"role": "user", "content": "hi"}
WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}]},
        "messages[0].content[0].more",
    ),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1.0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x", 1]}, "stop[1]"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": False, "stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": "yes"}, "stream"),
    ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"user": 5}, "user"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"prompt": "hi"}, "prompt"),
    ({"gbnf": "x"}, "gbnf"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_CHATS, ids=lambda value: str(value)[:50])
def test_a_wrong_chat_names_the_field(live: Live, fields: dict[str, Any], param: str) -> None:
    message = check(live.chat(**fields), 400, param=param)
    assert len(message) > 10


WRONG_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [1, "a"]}, "prompt[0]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [[97], [258]]}, "prompt"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"prompt": ["a"] * 9, "n": 2}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": [USER]}, "messages"),
    ({"add_generation_prompt": True}, "add_generation_prompt"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_COMPLETIONS, ids=lambda value: str(value)[:50])
def test_a_wrong_completion_names_the_field(live: Live, fields: dict[str, Any], param: str) -> None:
    check(live.complete(**{"prompt": "hi", **fields}), 400, param=param)


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_refused_and_its_neutral_values_are_not(live: Live, field: str) -> None:
    for url, body in ((CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "hi"})):
        body = {"model": MODEL, "max_tokens": 1, **body}
        check(live.http.post(url, json={**body, field: {"odd": 1}}), 400, param=field, code="unsupported_parameter")
        for value in (None, *UNSUPPORTED[field][0]):
            assert live.http.post(url, json={**body, field: value}).status_code == 200


def test_a_field_is_supported_or_not() -> None:
    assert not UNSUPPORTED.keys() & (ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys())


def test_more_messages_than_any_context_holds() -> None:
    body = {"model": MODEL, "messages": [USER] * MAX_MESSAGES}
    assert len(parse(ChatRequest, json.dumps(body).encode()).messages) == MAX_MESSAGES
    body["messages"] = [USER] * (MAX_MESSAGES + 1)
    with pytest.raises(ApiError, match=r"messages: .*at most 8192") as caught:
        parse(ChatRequest, json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_an_unknown_model(live: Live) -> None:
    message = check(live.chat(model="gpt-5"), 404, param="model", code="model_not_found")
    assert "gpt-5" in message
    assert MODEL in message
    with pytest.raises(openai.NotFoundError) as caught:
        live.openai().models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"
    check(live.http.post(CHAT, json={"messages": [USER]}), 400, param="model")


@pytest.mark.parametrize("way", ["chat", "completion"])
def test_too_long_gives_both_numbers(live: Live, way: str) -> None:
    asks = {"chat": (live.chat, "messages"), "completion": (live.complete, "prompt")}
    ask, param = asks[way]
    for settings_ in ({}, {"max_tokens": 5}, {"max_tokens": 5, "stream": True}):
        message = check(ask("x" * 60, **settings_), 400, param=param, code="context_length_exceeded")
        assert "64" in message
        if way == "completion":
            assert "61" in message
    with pytest.raises(openai.BadRequestError):
        live.openai().completions.create(model=MODEL, prompt="x" * 60)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nul", b"\xff", b'{"model": NaN}', b"[" * 5000, b'"\\ud800"', b"[]", b"5"]
)
def test_bodies_that_are_no_request(live: Live, body: bytes) -> None:
    for url in (CHAT, COMPLETIONS):
        check(live.http.post(url, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_content_types_that_are_not_json(live: Live, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    check(live.http.post(CHAT, content=b'{"model": "x"}', headers=headers), 415)
    content_type = {"content-type": "Application/JSON; charset=utf-8"}
    check(live.http.post(CHAT, content=b"{}", headers=content_type), 400, param="model")


def test_a_body_beyond_the_limit(live: Live) -> None:
    check(live.chat("x" * 30_000), 413, code="request_too_large")

    def parts() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(30):
            yield b"x" * 1000

    response = live.http.post(CHAT, content=parts(), headers={"content-type": "application/json"})
    check(response, 413, code="request_too_large")


def test_addresses_that_are_not_there(live: Live) -> None:
    check(live.http.get("/v1/nothing"), 404, code="unknown_url")
    check(live.http.get(CHAT + "/"), 404, code="unknown_url")
    response = live.http.get(CHAT)
    check(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_full_queue_says_when_to_come_back() -> None:
    runner = FakeRunner(num_blocks=256, max_model_len=200, step_delay_s=0.02)
    with serving(runner, engine={"max_num_seqs": 1, "max_queued": 2}, keep_alive_s=0.02) as live:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 150, "stream": True}
        with (
            live.http.stream("POST", COMPLETIONS, json=body),
            live.http.stream("POST", COMPLETIONS, json={**body, "prompt": ["a", "b"]}) as queued,
        ):
            assert queued.status_code == 200
            for more in ({}, {"stream": True}, {"n": 2}):
                response = live.complete(**more)
                check(response, 503, code="queue_full")
                assert 1 <= int(response.headers["retry-after"]) <= 120
            assert live.busy() == 3, "of a request that does not fit, nothing stays"
            with pytest.raises(openai.InternalServerError):
                live.openai().completions.create(model=MODEL, prompt="x")
            check(live.complete(n=4), 400, param="n")  # would not fit an idle engine either


def test_a_fault_of_one_request_is_500_and_the_next_is_served() -> None:
    runner = FakeRunner(num_blocks=256, max_model_len=200)
    with serving(runner) as live:

        def fail(step: Any) -> None:
            if any(chunk.request.prompt_ids[-1] == ord("!") for chunk in step.chunks):
                raise RuntimeError("bad luck")

        runner.on_execute = fail
        for more in ({}, {"n": 2}, {"stream": True}):
            message = check(live.complete("boom!", **more), 500, code="engine_fault")
            assert "bad luck" in message
        assert live.complete("fine", max_tokens=2).status_code == 200
        assert live.http.get("/health").status_code == 200
        assert live.busy() == 0


def test_a_dead_engine_is_503_and_says_why() -> None:
    runner = FakeRunner(num_blocks=256, max_model_len=200)
    with serving(runner) as live:

        def die(step: Any) -> None:
            raise RuntimeError("the power went")

        runner.on_execute = die
        for _ in range(20):
            response = live.complete()
            if response.status_code == 503:
                break
        assert "the power went" in check(response, 503, code="engine_dead")
        health = live.http.get("/health")
        assert health.status_code == 503
        assert health.json()["alive"] is False
        assert "the power went" in health.json()["reason"]


def test_the_table() -> None:
    assert describe(CheckpointError("no")).status == 400
    assert describe(EngineFault("x")).status == 500
    assert describe(EngineDead("x")).status == 503
    secret = describe(RuntimeError("/etc/secret"))
    assert (secret.status, secret.code) == (500, "internal_error")
    assert "secret" not in str(secret)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(ChatRequest.model_fields | CompletionRequest.model_fields | UNSUPPORTED)
FLAWS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON, "name": JSON}) | JSON, max_size=2
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flaws=FLAWS, messages=st.just([USER]) | MESSAGES, prompt=st.just("hi") | JSON)
def test_no_json_is_a_server_error(live: Live, flaws: dict[str, Any], messages: Any, prompt: Any) -> None:
    for url, field in ((CHAT, {"messages": messages}), (COMPLETIONS, {"prompt": prompt})):
        body = {"model": MODEL, "max_tokens": 2, **field, **flaws}
        # Infinity and NaN are written as Python's json writes them, which is not JSON.
        response = live.http.post(url, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert response.json()["error"]["message"]
