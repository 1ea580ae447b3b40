"""Server-sent events, and leaving when the client leaves.

The response starts with the first event, not before: whatever fails until then is an ordinary error answer with
its own status. A wait longer than the keep-alive interval starts it too, with a comment, so that proxies hold
the connection while a request is queued. After the start, a failure is one `data: {"error": ...}` event and the end.
When the client goes, the events' generator is cancelled and closed, which is how its request is aborted.

Reference: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dibit.server.errors import describe

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

T = TypeVar("T")
_log = logging.getLogger("dibit.server")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


def event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first (ClientGoneError)."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait({working, watching})
        if not working.cancelled():
            working.exception()  # seen, if only here


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends encoded events as they are made."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, keep_alive_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._started = False
        self._last_sent_s = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError):
            await until_disconnect(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        self._last_sent_s = asyncio.get_running_loop().time()
        pinging = asyncio.create_task(self._ping(send))
        try:
            async with aclosing(self._events):
                async for chunk in self._events:
                    await self._write(send, chunk)
        except Exception as error:
            if not self._started:
                raise
            answer = describe(error)
            if answer.code == "internal_error":
                _log.exception("a stream failed")
            await self._write(send, event(answer.body()))
        finally:
            pinging.cancel()
            await asyncio.wait({pinging})
        await self._write(send, b"", last=True)

    async def _write(self, send: Send, chunk: bytes, *, last: bool = False) -> None:
        async with self._sending:
            if not self._started:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._started = True
            await send({"type": "http.response.body", "body": chunk, "more_body": not last})
            self._last_sent_s = asyncio.get_running_loop().time()

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = self._last_sent_s + self._keep_alive_s - loop.time()
            if due_s > 0:
                await asyncio.sleep(due_s)
            else:
                await self._write(send, KEEP_ALIVE)
