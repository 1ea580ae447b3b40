"""One streamed request to an OpenAI endpoint, timed on the side of the client.

A chunk counts as output when it has text, or when it is neither the opening one (a role and nothing else) nor the
closing one (a finish reason and nothing else): a token of which no text is to be seen yet is a token too. Time to the
first token ends at the first chunk that counts, gaps lie between chunks that count, the latency ends with the last
chunk. Tokens are counted by the server (`usage`); where it does not tell, chunks are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import orjson

from dibit.bench.serve_prompts import Prompt

Backend = Literal["openai", "openai-chat"]
ENDPOINTS: dict[Backend, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_CONNECT_TIMEOUT_S = 30.0
_MOST_ERROR_CHARS = 400


@dataclass(frozen=True)
class Target:
    """What is asked, and how.

    url      of the endpoint
    model    its name in the API
    body     fields sent with every request, over those that the benchmark sets
    """

    url: str
    model: str
    backend: Backend = "openai"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    temperature: float | None = 0.0
    timeout_s: float = 3600.0


@dataclass(frozen=True)
class RequestResult:
    """Times in seconds; `start_s` on the clock of time.perf_counter. A failed request has an `error`, and of the
    rest what was known when it failed.

    gaps_s  between chunks of output, one fewer than chunks
    """

    start_s: float
    ttft_s: float
    latency_s: float
    gaps_s: tuple[float, ...]
    input_tokens: int
    output_tokens: int
    text: str
    error: str = ""

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 where there is only one."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def open_client() -> httpx.AsyncClient:
    """A client without a limit of connections: how many requests run at once is the benchmark's to say."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def send(client: httpx.AsyncClient, target: Target, prompt: Prompt) -> RequestResult:
    """Never raises for what goes wrong on the way: the result says so."""
    reading = _Reading(time.perf_counter(), prompt)
    try:
        async with asyncio.timeout(target.timeout_s):
            content, headers = orjson.dumps(_body(target, prompt)), {"Content-Type": "application/json"}
            async with client.stream(
                "POST", target.url, content=content, headers={**headers, **target.headers}
            ) as response:
                if response.status_code != 200:
                    told = (await response.aread()).decode("utf-8", "replace")
                    return reading.failed(f"HTTP {response.status_code}: {_message(told)}")
                async for data in _events(response.aiter_bytes()):
                    reading.add(data, time.perf_counter())
    except TimeoutError:
        return reading.failed(f"no complete answer within {target.timeout_s:g} s")
    except (httpx.HTTPError, OSError) as error:
        return reading.failed(f"{type(error).__name__}: {error}".rstrip(": "))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return reading.failed(f"an answer that is no OpenAI stream: {error!r}")
    return reading.finished()


def _body(target: Target, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    if target.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": prompt.text}]
        body["max_completion_tokens"] = prompt.output_tokens
    else:
        body["prompt"] = prompt.text
        body["max_tokens"] = prompt.output_tokens
    if target.temperature is not None:
        body["temperature"] = target.temperature
    if target.ignore_eos:
        body["ignore_eos"] = True
    return {**body, **target.body}


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Data of server-sent events, a line each, as every OpenAI server writes them."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


class _Reading:
    """What has come of an answer so far."""

    def __init__(self, start_s: float, prompt: Prompt) -> None:
        self._start_s = self._last_s = self._counted_s = start_s
        self._ttft_s = 0.0
        self._gaps_s: list[float] = []
        self._texts: list[str] = []
        self._chunks = 0
        self._input_tokens = prompt.input_tokens
        self._output_tokens: int | None = None
        self._error = ""
        self._ended = False

    def add(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        chunk = orjson.loads(data)
        if error := chunk.get("error"):
            self._error = str(error.get("message", error) if isinstance(error, dict) else error)
        if usage := chunk.get("usage"):
            self._input_tokens = usage["prompt_tokens"]
            self._output_tokens = usage.get("completion_tokens", 0)
        if choices := chunk.get("choices"):
            self._add_choice(choices[0], now_s)

    def _add_choice(self, choice: dict[str, Any], now_s: float) -> None:
        self._last_s = now_s
        delta = choice.get("delta")
        parts = choice if delta is None else delta
        text = "".join(parts.get(name) or "" for name in ("text", "reasoning_content", "reasoning", "content"))
        ends = choice.get("finish_reason") is not None
        self._ended |= ends
        opens = not self._chunks and delta is not None and "role" in delta
        if not text and not parts.get("tool_calls") and (ends or opens):
            return
        self._texts.append(text)
        if self._chunks:
            self._gaps_s.append(now_s - self._counted_s)
        else:
            self._ttft_s = now_s - self._start_s
        self._chunks += 1
        self._counted_s = now_s

    def finished(self) -> RequestResult:
        if self._error:
            return self.failed(self._error)
        if not self._ended:
            return self.failed("the stream ended before the answer did")
        if self._output_tokens is None:
            self._output_tokens = self._chunks
        if not self._output_tokens:
            return self.failed("an answer without a token")
        if not self._chunks:
            self._ttft_s = self._last_s - self._start_s
        return self._result("")

    def failed(self, error: str) -> RequestResult:
        return self._result(error)

    def _result(self, error: str) -> RequestResult:
        return RequestResult(
            start_s=self._start_s,
            ttft_s=self._ttft_s,
            latency_s=self._last_s - self._start_s,
            gaps_s=tuple(self._gaps_s),
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens if self._output_tokens is not None else self._chunks,
            text="".join(self._texts),
            error=error[:_MOST_ERROR_CHARS],
        )


def _message(body: str) -> str:
    """The message of an OpenAI error, or the body as it is."""
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip() or "no message"
