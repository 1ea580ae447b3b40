"""Clients that are slow, silent or endless, on raw sockets: none keeps a connection for ever, none costs the others."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from dibit.server import connections, validation
from fakes import FakeRunner
from server_harness import CHAT, COMPLETIONS, MODEL, Live, serving, wait_until


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    runner = FakeRunner(num_blocks=1024, max_model_len=256, step_delay_s=0.005)
    with serving(runner, max_body_bytes=20_000) as live:
        yield live


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(validation, "BODY_STALL_S", 0.3)


def connect(live: Live) -> socket.socket:
    port = int(live.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def post(body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    lines = (
        f"POST {COMPLETIONS} HTTP/1.1".encode(),
        b"Host: x",
        b"Content-Type: application/json",
        b"Content-Length: %d" % (len(body) if length is None else length),
        *headers,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def asked(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "hi", **fields}).encode()


def until_closed(sock: socket.socket) -> bytes:
    found = b""
    while part := sock.recv(65536):
        found += part
    return found


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("sent", [b"", b"GE", HEAD, HEAD + b"X-Half: "], ids=["nothing", "two", "half", "header"])
def test_a_head_that_does_not_come_ends_the_connection(live: Live, sent: bytes) -> None:
    with closing(connect(live)) as sock:
        sock.sendall(sent)
        assert until_closed(sock) == b""


@pytest.mark.usefixtures("_impatient")
def test_a_second_head_that_does_not_come_ends_the_connection(live: Live) -> None:
    with closing(connect(live)) as sock:
        sock.sendall(HEAD + b"\r\n" + HEAD)
        assert until_closed(sock).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("_impatient")
def test_an_answer_may_take_longer_than_a_head(live: Live) -> None:
    body = asked(max_tokens=150, ignore_eos=True)
    with closing(connect(live)) as sock:
        began_s = time.monotonic()
        for _ in range(2):
            sock.sendall(post(body))
            found = b""
            while b'"usage"' not in found:
                part = sock.recv(65536)
                assert part
                found += part
            assert found.startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began_s > 2 * connections.HEAD_TIMEOUT_S


def test_a_head_without_end_is_refused(live: Live) -> None:
    with closing(connect(live)) as sock:
        sock.sendall(HEAD)
        found = b""
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - whichever piece it is
            for i in range(10_000):
                sock.sendall(b"X-%d: %s\r\n" % (i, b"a" * 1000))
                time.sleep(0.0005)
                sock.setblocking(False)
                try:
                    found += sock.recv(65536)
                except BlockingIOError:
                    pass
                finally:
                    sock.settimeout(5)
        assert not found or found.startswith(b"HTTP/1.1 431")
    assert live.http.get("/health").status_code == 200


@pytest.mark.usefixtures("_impatient")
def test_a_body_that_stops_coming_is_408(live: Live) -> None:
    body = asked()
    with closing(connect(live)) as sock:
        sock.sendall(post(body[:-5], length=len(body)))
        answer = until_closed(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"%d bytes of the body came" % (len(body) - 5) in answer
    assert live.busy() == 0


@pytest.mark.usefixtures("_impatient")
def test_a_body_that_comes_slowly_is_served(live: Live) -> None:
    body = asked(max_tokens=2)
    with closing(connect(live)) as sock:
        sock.sendall(post(b"", b"Connection: close", length=len(body)))
        for i in range(0, len(body), 10):
            time.sleep(0.1)
            sock.sendall(body[i : i + 10])
        assert until_closed(sock).startswith(b"HTTP/1.1 200")


def test_a_client_that_leaves_within_its_body_leaves_nothing(live: Live) -> None:
    for _ in range(5):
        with closing(connect(live)) as sock:
            sock.sendall(post(asked()[:-5], length=500))
    assert live.http.get("/health").status_code == 200
    assert live.busy() == 0


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "stream"])
def test_a_client_that_resets_frees_its_blocks(live: Live, fields: dict[str, bool]) -> None:
    free = live.engine.stats().free_blocks
    with closing(connect(live)) as sock:
        sock.sendall(post(asked(max_tokens=250, ignore_eos=True, **fields)))
        wait_until(lambda: live.busy() == 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_until(lambda: live.busy() == 0)
    wait_until(lambda: live.engine.stats().free_blocks == free)


def test_a_client_that_does_not_read_keeps_nobody_waiting(live: Live) -> None:
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", int(live.url.rpartition(":")[2])))
        sock.sendall(post(asked(max_tokens=200, ignore_eos=True, stream=True, logprobs=20)))
        wait_until(lambda: live.busy() == 1)
        assert live.complete(max_tokens=2).status_code == 200
        wait_until(lambda: live.busy() == 0, timeout_s=10)


@pytest.mark.parametrize("reads", [{True}, set()], ids=["reads", "waits"])
def test_a_client_that_reads_no_further_is_cut(monkeypatch: pytest.MonkeyPatch, reads: set[bool]) -> None:
    monkeypatch.setattr(connections, "READ_TIMEOUT_S", 0.05)
    transport = Mock(spec=asyncio.Transport)
    transport.get_extra_info.return_value = None

    async def wait() -> None:
        config = uvicorn.Config(FastAPI(), log_config=None)
        loop = asyncio.get_running_loop()
        connection = connections.Connection(config, uvicorn.server.ServerState(), {}, loop)
        connection.connection_made(transport)
        connection.pause_writing()
        if reads:
            connection.resume_writing()
        await asyncio.sleep(0.2)
        connection.connection_lost(None)

    asyncio.run(wait())
    assert transport.abort.called is not bool(reads)


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        post(b"abcdef", b"Content-Length: 5"),
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n".encode(),
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n".encode(),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_not_http_is_refused(live: Live, sent: bytes) -> None:
    with closing(connect(live)) as sock:
        sock.sendall(sent)
        assert sock.recv(65536).startswith(b"HTTP/1.1 4")
    assert live.http.get("/health").status_code == 200


def test_chunks_without_end_are_413(live: Live) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a" * 1000

    try:
        response = live.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    except (httpx.WriteError, httpx.ReadError):
        return
    assert response.status_code == 413


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/version", "/v1/models", f"/v1/models/{MODEL}"])
def test_head_is_get_without_its_body(live: Live, path: str) -> None:
    get, head = live.http.get(path), live.http.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.content))


def test_head_of_what_is_not_there(live: Live) -> None:
    assert live.http.head("/nowhere").status_code == 404
    assert live.http.head(CHAT).status_code == 405


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"content-type": "application/json; charset=latin-1"}, "latin-1"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "gzip"),
    ],
)
def test_a_body_in_another_dress_is_415(live: Live, headers: dict[str, str], says: str) -> None:
    response = live.http.post(COMPLETIONS, content=asked(), headers=headers)
    assert response.status_code == 415
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": 'Application/JSON; charset="UTF-8"'},
        {"content-type": "application/json;odd=1; charset=utf-8; more=2", "content-encoding": "identity"},
    ],
)
def test_a_body_that_says_what_it_is(live: Live, headers: dict[str, str]) -> None:
    assert live.http.post(COMPLETIONS, content=asked(max_tokens=1), headers=headers).status_code == 200
