"""Clients that leave, floods, draining, signals, ports."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dibit.engine.errors import ConfigError
from dibit.server.lifecycle import ServerSettings, bind_socket
from fakes import FakeRunner
from server_harness import CHAT, COMPLETIONS, MODEL, Live, events, serving, wait_until

LONG = {"model": MODEL, "prompt": "x", "max_tokens": 3000, "temperature": 0}
TESTS = Path(__file__).parent.parent


def slow_runner(step_delay_s: float = 0.01) -> FakeRunner:
    return FakeRunner(num_blocks=8192, max_model_len=4096, step_delay_s=step_delay_s)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """What was said of each request, and its fields."""
    found = [record.getMessage() for record in caplog.records if record.name == "dibit.server"]
    found = [message for message in found if message.startswith("request ") and "{" in message]
    return [(message.split(" {")[0], json.loads(message[message.index("{") :])) for message in found]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("way", ["streamed", "whole"])
def test_a_client_that_leaves_stops_its_request(caplog: pytest.LogCaptureFixture, way: str, n: int) -> None:
    caplog.set_level(logging.INFO, logger="dibit.server")
    with serving(slow_runner()) as live:
        if way == "streamed":
            with live.http.stream("POST", COMPLETIONS, json={**LONG, "stream": True, "n": n}) as response:
                parts = response.iter_raw()  # closes the connection when it is dropped
                next(parts)
                wait_until(lambda: live.busy() == n)
        else:
            with pytest.raises(httpx.ReadTimeout):
                # Long enough for a first token on a busy machine, and a small part of what the answer takes.
                live.http.post(COMPLETIONS, json={**LONG, "n": n}, timeout=1.0)
        assert wait_until(lambda: live.busy() == 0) < 1
        wait_until(lambda: bool(lines(caplog)))
        [(result, line)] = lines(caplog)
        assert result == "request aborted by client"
        assert line["choices"] == n
        assert 0 < line["completion_tokens"] < 3000 * n
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_client_that_leaves_the_queue(caplog: pytest.LogCaptureFixture) -> None:
    with serving(slow_runner(), engine={"max_num_seqs": 1}, keep_alive_s=0.05) as live:
        with live.http.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as running:
            parts = running.iter_raw()
            next(parts)
            for more in ({}, {"stream": True}):
                with pytest.raises(httpx.ReadTimeout):
                    live.http.post(COMPLETIONS, json={**LONG, **more}, timeout=httpx.Timeout(5, read=0.03))
                assert wait_until(lambda: live.busy() == 1) < 1
            with live.http.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as queued:
                comments = queued.iter_raw()
                assert next(comments).startswith(b": ")
                assert live.busy() == 2
            assert wait_until(lambda: live.busy() == 1) < 1
        assert wait_until(lambda: live.busy() == 0) < 1
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_two_hundred_clients_give_up_and_the_next_is_answered() -> None:
    with serving(slow_runner(0.005)) as live:

        async def flood() -> int:
            gave_up = 0
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=live.url, limits=limits) as http:

                async def one(i: int) -> None:
                    nonlocal gave_up
                    body = {**LONG, "prompt": f"client {i}", "stream": i % 2 == 0}
                    try:
                        await asyncio.wait_for(http.post(COMPLETIONS, json=body, timeout=30), 0.5)
                    except TimeoutError:
                        gave_up += 1

                await asyncio.gather(*(one(i) for i in range(200)))
            return gave_up

        assert asyncio.run(flood()) == 200
        start_s = time.monotonic()
        answer = live.chat(max_tokens=3)
        assert answer.status_code == 200
        assert time.monotonic() - start_s < 5
        assert wait_until(lambda: live.busy() == 0) < 1


def test_the_line_about_a_finished_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dibit.server")
    with serving(FakeRunner(num_blocks=256)) as live:
        answer = live.http.post(
            CHAT,
            json={
                "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 2,
                "user": 'eve"\n', "metadata": {"team": "a"},
            },
            headers={"x-request-id": "trace-7"},
        )  # fmt: skip
        [(result, line)] = lines(caplog)
    assert result == "request finished"
    assert "\n" not in caplog.records[-1].getMessage()
    assert line.pop("ttft_ms") <= line.pop("duration_ms")
    assert line == {
        "id": answer.json()["id"],
        "request_id": "trace-7",
        "endpoint": "chat",
        "stream": False,
        "choices": 2,
        "prompt_tokens": 21,
        "cached_tokens": 0,
        "completion_tokens": 6,
        "finish_reason": "length",
        "user": 'eve"\n',
        "metadata": {"team": "a"},
    }


def ask_in_thread(live: Live, **fields: Any) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(live.http.post(COMPLETIONS, json={**LONG, **fields})))
    thread.start()
    wait_until(lambda: live.engine.stats().running > 0)
    return thread, answers


@pytest.mark.parametrize("stream", [{}, {"stream": True}])
def test_draining_finishes_what_runs_and_refuses_what_comes(stream: dict[str, bool]) -> None:
    with serving(slow_runner(), drain_timeout_s=20) as live:
        thread, answers = ask_in_thread(live, max_tokens=60, **stream)
        live.server.begin_drain()
        wait_until(lambda: live.engine.draining)
        health = live.http.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["alive"]) == (503, "draining", True)
        assert health.json()["reason"]
        for more in ({}, {"stream": True}):
            refused = live.complete(**more)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert "retry-after" in refused.headers
        assert live.http.get("/v1/models").status_code == 200
        thread.join(10)
        assert answers[0].status_code == 200
        if stream:
            found = events(answers[0].text)
            assert found[-1] == "[DONE]"
            assert len(found) == 61
        else:
            assert answers[0].json()["usage"]["completion_tokens"] == 60
        live.thread.join(10)
        assert not live.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            live.http.get("/health")


@pytest.mark.parametrize("stream", [{}, {"stream": True}, {"n": 2}])
def test_draining_aborts_what_takes_too_long(stream: dict[str, Any]) -> None:
    with serving(slow_runner(), drain_timeout_s=0.2) as live:
        thread, answers = ask_in_thread(live, **stream)
        live.server.begin_drain()
        live.thread.join(5)
        assert not live.thread.is_alive()
        thread.join(5)
        if "stream" in stream:
            found = events(answers[0].text)
            assert found[-1]["error"]["code"] == "shutting_down"
        else:
            assert answers[0].status_code == 503
            assert answers[0].json()["error"]["code"] == "shutting_down"


SERVE = f"""
import logging, sys
sys.path.insert(0, {str(TESTS)!r})
from fakes import FakeRunner, fake_core
from dibit.engine.async_engine import AsyncEngine
from dibit.engine.transport import ThreadTransport
from dibit.server.lifecycle import ServerSettings, bind_socket, serve
logging.basicConfig(level=logging.INFO)
sock = bind_socket("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
runner = FakeRunner(num_blocks=8192, max_model_len=4096, step_delay_s=0.01)
engine = AsyncEngine(ThreadTransport(fake_core(runner)), model_name="org/fake")
serve(engine, ServerSettings(drain_timeout_s=20), sock=sock)
print("left", flush=True)
"""


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{child.stdout.readline().strip()}"

        def ready() -> bool:
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.ConnectError:
                return False

        try:
            wait_until(ready, timeout_s=20)
            yield child, url
        finally:
            child.kill()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_status_0(
    process: tuple[subprocess.Popen[str], str], sig: signal.Signals
) -> None:
    child, url = process
    with httpx.stream("POST", url + COMPLETIONS, json={**LONG, "max_tokens": 40, "stream": True}) as response:
        parts = response.iter_text()
        text = next(parts)
        child.send_signal(sig)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        text += "".join(parts)
    assert len(events(text)) == 41
    out, err = child.communicate(timeout=10)
    assert child.returncode == 0, err
    assert out == "left\n"
    assert "shutting down" in err
    assert "Traceback" not in err


def test_a_second_signal_ends_at_once(process: tuple[subprocess.Popen[str], str]) -> None:
    child, url = process
    with httpx.stream("POST", url + COMPLETIONS, json={**LONG, "stream": True}) as response:
        parts = response.iter_raw()
        next(parts)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        start_s = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=5) == 128 + signal.SIGTERM
        assert time.monotonic() - start_s < 1


def test_a_port_in_use_is_one_message() -> None:
    with bind_socket("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1, port {port}: .*in use.*--port"):
            bind_socket("127.0.0.1", port)
    with bind_socket("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 80), ("127.0.0.1", 65536), ("127.0.0.1", -1)])
def test_an_address_that_cannot_be_had(host: str, port: int) -> None:
    with pytest.raises(ConfigError):
        bind_socket(host, port)


def test_localhost_is_the_address_every_client_tries() -> None:
    with bind_socket("localhost", 0) as sock:
        assert sock.family == socket.AF_INET


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cors_origins": ("https://a.example/path",)}, "without a path"),
        ({"connection_idle_s": 0}, "connection_idle_s is 0"),
        ({"max_body_bytes": -1}, "max_body_bytes is -1"),
        ({"keep_alive_s": float("nan")}, "keep_alive_s is nan"),
        ({"drain_timeout_s": -1.0}, "drain_timeout_s is -1"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**settings)


def test_origins_as_browsers_send_them() -> None:
    ServerSettings(cors_origins=("*", "https://chat.example.org", "http://localhost:3000", "http://[::1]:80"))
