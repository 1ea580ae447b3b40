"""A connection that does not wait for ever, nor remember for ever, for a client that sends or reads no further.

uvicorn closes a connection that idles between two requests. One that has sent nothing yet, or a part of a head, it
keeps as long as the client likes, and the head with it, of any length; so it does one whose client does not read its
answer. Here a head has HEAD_TIMEOUT_S and MAX_HEAD_BYTES, and an answer that waits for its reader READ_TIMEOUT_S;
bodies have the limits of validation.py.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 20.0
MAX_HEAD_BYTES = 64 * 1024
READ_TIMEOUT_S = 120.0
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(HttpToolsProtocol):
    _closing: asyncio.TimerHandle | None = None
    _aborting: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_aborting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._closing is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not closed: that would wait for what is unread to be read.
        self._aborting = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_aborting()
        super().resume_writing()

    def _stop_aborting(self) -> None:
        if self._aborting is not None:
            self._aborting.cancel()
            self._aborting = None

    def _await_head(self) -> None:
        if self._closing is None:
            self._head_bytes = 0
            self._closing = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
