"""A server on a loopback port in a thread, over an engine whose model is fake."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from dibit.engine.async_engine import AsyncEngine
from dibit.engine.transport import ThreadTransport, Transport
from dibit.server.app import create_app
from dibit.server.lifecycle import Server, bind_socket
from fakes import FakeRunner, fake_core

MODEL = "org/fake"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Live:
    """A running server."""

    url: str
    engine: AsyncEngine
    runner: FakeRunner
    server: Server
    thread: threading.Thread
    http: httpx.Client

    def openai(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, **settings)

    def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return self.http.post(CHAT, json=body)

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return self.http.post(COMPLETIONS, json={"model": MODEL, "prompt": prompt, **fields})

    def busy(self) -> int:
        """Requests in the engine."""
        stats = self.engine.stats()
        return stats.running + stats.waiting


@contextmanager
def serving(
    runner: FakeRunner | None = None,
    *,
    drain_timeout_s: float = 5.0,
    engine: dict[str, Any] | None = None,
    transport: Transport | None = None,
    **settings: Any,
) -> Iterator[Live]:
    """`engine` are EngineConfig fields, for a thread if there is no `transport`; the rest arguments of create_app."""
    runner = runner or FakeRunner(num_blocks=1024, max_model_len=256)
    transport = transport or ThreadTransport(fake_core(runner, **(engine or {})))
    async_engine = AsyncEngine(transport, model_name=MODEL)
    sock = bind_socket("127.0.0.1", 0)
    sock.listen(512)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = Server(create_app(async_engine, **settings), async_engine, drain_timeout_s=drain_timeout_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started)
        # Explicit limits: a test that hangs says where.
        with httpx.Client(base_url=url, timeout=20, limits=httpx.Limits(max_connections=None)) as http:
            yield Live(url, async_engine, runner, server, thread, http)
    finally:
        server.should_exit = True
        thread.join(20)
        async_engine.stop(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> float:
    """Seconds until `condition` held. Fails when it does not hold in time."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.005)
    return time.monotonic() - start_s


def events(text: str) -> list[Any]:
    """Data of the events in a stream, "[DONE]" as it is. Fails on anything that is not an event or a comment."""
    assert text.endswith("\n\n")
    found: list[Any] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
