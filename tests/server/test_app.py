"""The routes beside the completions, the key, cross-origin pages, request ids, the description of the API."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import openai
import pytest

import dibit.server
from dibit.server.app import create_app
from server_harness import CHAT, MODEL, Live, serving

KEY = "sekrit-ключ"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with serving(api_key=KEY, cors_origins=["https://app.example"]) as live:
        yield live


def test_models(live: Live) -> None:
    [model] = live.openai().models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "dibit")
    assert live.openai().models.retrieve(MODEL) == model
    assert live.http.get("/v1/models").json()["data"][0]["max_model_len"] == live.engine.max_model_len


def test_the_name_of_the_model_can_be_chosen() -> None:
    with serving(model_name="mine") as live:
        assert live.chat(model="mine", max_tokens=1).json()["model"] == "mine"
        assert live.chat(max_tokens=1).status_code == 404


def test_health(live: Live) -> None:
    answer = live.http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok", "alive": True, "ready": True, "reason": None, "model": MODEL, "running": 0, "waiting": 0,
    }  # fmt: skip
    assert re.fullmatch(r"\d+\.\d+.*", live.http.get("/version").json()["version"])


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    answer = live.http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = answer.text
    assert CHAT in page
    assert "stream: true" in page
    assert not re.findall(r"https?://|@import|url\(|<link(?![^>]*data:)|src=", page)
    # For people who use a screen reader or the keyboard.
    assert '<html lang="en">' in page
    assert 'role="log"' in page
    for field in re.findall(r"<(?:input|textarea)[^>]*>", page):
        assert re.search(r"<label[^>]*>(?:(?!</label>).)*" + re.escape(field), page, re.DOTALL), field


@pytest.mark.parametrize("given", ["abc-123", "x" * 200])
def test_a_request_id_comes_back(live: Live, given: str) -> None:
    for response in (
        live.http.get("/health", headers={"x-request-id": given}),
        live.http.get("/no", headers={"x-request-id": given}),
    ):
        assert response.headers["x-request-id"] == given


def test_a_request_id_is_made_where_there_is_none_or_a_bad_one(live: Live) -> None:
    made = [
        live.http.get("/health", headers=headers).headers["x-request-id"] for headers in ({}, {"x-request-id": "a b"})
    ]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    assert len(set(made)) == 2
    assert live.chat(max_tokens=1, stream=True).headers["x-request-id"]
    assert live.chat(temperature=9).headers["x-request-id"]


@pytest.mark.parametrize("value", [None, "Bearer", "Bearer wrong", "Basic abc", KEY.encode(), b"Bearer \xff\xfe"])
def test_without_the_key_v1_is_closed(locked: Live, value: str | bytes | None) -> None:
    headers = httpx.Headers(
        {} if value is None else [(b"authorization", value.encode() if isinstance(value, str) else value)]
    )
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/v1/nothing"), ("GET", "/v1")):
        answer = locked.http.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text


def test_what_is_not_under_v1_needs_no_key(locked: Live) -> None:
    for path in ("/health", "/", "/version", "/openapi.json"):
        assert locked.http.get(path).status_code == 200


def test_with_the_key_v1_is_open(locked: Live) -> None:
    headers = {b"authorization": b"Bearer " + KEY.encode()}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert locked.http.post(CHAT, json=body, headers=headers).status_code == 200
    assert locked.http.get("/v1/models", headers={b"authorization": b"bearer  " + KEY.encode()}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        locked.openai().models.list()


def test_pages_of_other_origins(locked: Live, live: Live) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    allowed = locked.http.options(CHAT, headers=ask)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = locked.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.headers["access-control-allow-origin"] == "https://app.example", "errors are readable too"
    other = locked.http.get("/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in live.http.get("/health", headers=ask).headers


def test_the_description_is_complete(live: Live) -> None:
    description = live.http.get("/openapi.json").json()
    assert set(description["paths"]) == {
        CHAT, "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/v1/models/{model_id}", "/health",
        "/metrics", "/version",
    }  # fmt: skip
    shapes = description["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/(\w+)", live.http.get("/openapi.json").text))
    assert references <= shapes.keys()
    assert {
        "ChatRequest",
        "ChatCompletion",
        "ChatChunk",
        "CompletionRequest",
        "TextCompletion",
        "ErrorReply",
    } <= references
    assert shapes["ChatRequest"]["required"] == ["model", "messages"]
    assert "#/$defs" not in live.http.get("/openapi.json").text


def test_create_app_is_what_the_package_offers() -> None:
    assert dibit.server.create_app is create_app
    with pytest.raises(AttributeError):
        dibit.server.nothing  # noqa: B018
