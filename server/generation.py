"""The choices of one HTTP request: submitted together, merged, counted, ended together, logged in one line.

Invariant: on leaving the `async with` block, however it is left, no choice runs on in the engine, and exactly one
line about the request has been logged if it was accepted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import orjson

from dibit.engine.async_engine import AsyncEngine, RequestStream
from dibit.engine.config import SamplingParams
from dibit.engine.errors import EngineFault, RequestError
from dibit.engine.outputs import RequestOutput
from dibit.engine.request import FinishReason
from dibit.server import replies
from dibit.server.errors import describe, shutting_down

_log = logging.getLogger("dibit.server")

# Outputs of several choices that wait for a slow client; the engine merges what comes beyond.
_MAX_PENDING = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: the prompt's place among the request's prompts, its tokens, and how to go on from them."""

    prompt: int
    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Entry:
    """What the log line says besides the counts. `arrival_s` is on the clock of time.perf_counter."""

    endpoint: str
    request_id: str
    arrival_s: float
    stream: bool
    labels: Mapping[str, object]


class Generation:
    """An async context manager that submits, and an async iterator of (index of the choice, output).

    Entering raises RequestError, CapacityError, EngineDead or, during shutdown, ApiError; iterating raises EngineFault
    and EngineDead, and ApiError when a shutdown did not wait any longer.
    """

    def __init__(
        self, engine: AsyncEngine, choices: Sequence[Choice], *, id: str, prompt_field: str, entry: Entry
    ) -> None:
        self.id = id
        self._engine = engine
        self._choices = choices
        self._prompt_field = prompt_field
        self._entry = entry
        self._streams: list[RequestStream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._merged: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(_MAX_PENDING)
        self._latest: dict[int, RequestOutput] = {}
        self._open = len(choices)
        self._ttft_s: float | None = None

    async def __aenter__(self) -> Generation:
        if self._engine.draining:
            raise shutting_down()
        try:
            for i, choice in enumerate(self._choices):
                self._streams.append(self._engine.generate(f"{self.id}-{i}", choice.prompt_ids, choice.params))
        except RequestError as error:
            if error.param in ("prompt", "messages"):
                error.param = self._prompt_field
            await self._close()
            raise
        except BaseException:
            await self._close()
            raise
        if len(self._streams) > 1:
            self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()
        self._write_log(error)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if not self._open:
            raise StopAsyncIteration
        if not self._pumps:
            index, output = 0, await anext(self._streams[0])
        else:
            index, news = await self._merged.get()
            if isinstance(news, Exception):
                raise news
            output = news
        if output.finish_reason is FinishReason.ERROR:
            raise EngineFault(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            raise shutting_down()
        self._latest[index] = output
        if self._ttft_s is None:
            self._ttft_s = time.perf_counter() - self._entry.arrival_s
        self._open -= output.finished
        return index, output

    def usage(self) -> replies.Usage:
        """So far. Choices of one prompt share its tokens, which count once."""
        counts: list[tuple[int, int, int]] = []
        prompts: set[int] = set()
        for index, output in sorted(self._latest.items()):
            prompt = self._choices[index].prompt
            own = (0, 0) if prompt in prompts else (output.num_prompt, output.num_cached)
            prompts.add(prompt)
            counts.append((own[0], output.num_output, own[1]))
        return replies.usage(counts)

    async def _pump(self, index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await self._merged.put((index, output))
        except Exception as error:
            await self._merged.put((index, error))

    async def _close(self) -> None:
        for stream in self._streams:
            await stream.aclose()
        for pump in self._pumps:
            pump.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)

    def _write_log(self, error: BaseException | None) -> None:
        usage = self.usage()
        line: dict[str, object] = {
            "id": self.id,
            "request_id": self._entry.request_id,
            "endpoint": self._entry.endpoint,
            "stream": self._entry.stream,
            "choices": len(self._choices),
            "prompt_tokens": sum({choice.prompt: len(choice.prompt_ids) for choice in self._choices}.values()),
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "ttft_ms": None if self._ttft_s is None else round(self._ttft_s * 1e3, 1),
            "duration_ms": round((time.perf_counter() - self._entry.arrival_s) * 1e3, 1),
            **self._entry.labels,
        }
        level, result = logging.INFO, "finished"
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            result = "aborted by client"
        elif error is not None:
            level, result = logging.WARNING, "failed"
            line["error"] = describe(error).code
            line["cause"] = f"{type(error).__name__}: {error}"
        else:
            reasons = {output.finish_reason.value for output in self._latest.values() if output.finish_reason}
            line["finish_reason"] = ",".join(sorted(reasons))
        _log.log(level, "request %s %s", result, orjson.dumps(line, default=str).decode())
