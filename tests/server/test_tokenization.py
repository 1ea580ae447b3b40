"""POST /tokenize and /detokenize: the tokens that a completion of the same would have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fakes import BOS, EOS
from server_harness import MODEL, Live, serving

USER = {"role": "user", "content": "hé"}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


def test_a_text(live: Live) -> None:
    found = live.http.post("/tokenize", json={"model": MODEL, "prompt": "hé"}).json()
    assert found == {"count": 4, "max_model_len": 256, "tokens": [BOS, *"hé".encode()], "token_strs": None}
    bare = live.http.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False, "return_token_strs": True})
    assert bare.json()["tokens"] == [*b"hi"]
    assert bare.json()["token_strs"] == ["h", "i"]
    assert live.http.post("/tokenize", json={"prompt": ""}).json()["count"] == 1


@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"continue_final_message": True, "add_generation_prompt": False}]
)
def test_messages_are_what_a_chat_has(live: Live, options: dict[str, Any]) -> None:
    found = live.http.post("/tokenize", json={"messages": [USER], **options}).json()
    chat = live.chat("hé", max_tokens=1, **options).json()
    assert found["count"] == chat["usage"]["prompt_tokens"] == len(found["tokens"])


def test_there_and_back(live: Live) -> None:
    tokens = [BOS, *"hé".encode(), EOS]
    assert live.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json() == {"prompt": "<s>hé</s>"}
    assert live.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "max_tokens": 3}, 400, "max_tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 258]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(live: Live, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = live.http.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_they_need_the_key() -> None:
    with serving(api_key="secret") as live:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert live.http.post(path, json=body).status_code == 401
            authorized = {"authorization": "Bearer secret"}
            assert live.http.post(path, json=body, headers=authorized).status_code == 200
