"""From a bound port to a clean end: the socket, the signals, the drain.

The first SIGTERM or SIGINT: new requests are refused (503, also /health) while those in flight are finished, for at
most drain_timeout_s; then they are aborted, the port is closed, and the process ends with status 0. A second signal
ends it at once with 128 + its number.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dibit.engine.async_engine import AsyncEngine
from dibit.engine.errors import ConfigError
from dibit.server.app import create_app
from dibit.server.connections import Connection

_log = logging.getLogger("dibit.server")

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")

BACKLOG = 2048
# Time in which answers already computed must reach their clients after the drain.
FLUSH_TIMEOUT_S = 5


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything slow is done. Raises ConfigError. Port 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must lie in [0, 65535]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name with both kinds of address, such as localhost, means the one that every client tries.
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host!r}, port {port}: {error}; check --host and --port") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from error
    return sock


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}, port {port}: {error.strerror or error}; "
        "choose another with --port (0 takes a free one), or stop the program that uses it"
    )


@dataclass(frozen=True)
class ServerSettings:
    """How clients are served, checked once. Raises ConfigError.

    drain_timeout_s    what requests in flight may still take after the first signal
    connection_idle_s  a connection without requests is closed after this long
    The others are those of `create_app`.
    """

    model_name: str | None = None
    api_key: str | None = None
    drain_timeout_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    keep_alive_s: float = 15.0
    connection_idle_s: float = 5.0
    max_body_bytes: int = 8 * 2**20

    def __post_init__(self) -> None:
        for name in ("keep_alive_s", "connection_idle_s", "max_body_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise ConfigError(f"drain_timeout_s is {self.drain_timeout_s}; it must be 0 or more")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"{origin!r} is not an origin; write scheme, host and port as the browser sends them, without a "
                    "path, for example https://chat.example.org or http://localhost:3000, or * for any"
                )


def serve(engine: AsyncEngine, settings: ServerSettings | None = None, *, sock: socket.socket) -> None:
    """Serves `engine` on a socket from `bind_socket` until a signal ends it; blocks.

    Raises ConfigError when the address cannot be had.
    """
    settings = settings or ServerSettings()
    model_name = settings.model_name
    app = create_app(
        engine,
        model_name=model_name,
        api_key=settings.api_key,
        cors_origins=settings.cors_origins,
        keep_alive_s=settings.keep_alive_s,
        max_body_bytes=settings.max_body_bytes,
    )
    name = sock.getsockname()
    try:
        # Two processes may have bound one port before either listens.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_listen(str(name[0]), name[1], error) from error
    where = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    _log.info("serving %s on http://%s:%d", model_name or engine.model_name, where, name[1])
    server = Server(app, engine, drain_timeout_s=settings.drain_timeout_s, connection_idle_s=settings.connection_idle_s)
    server.run(sockets=[sock])


class Server(uvicorn.Server):
    """uvicorn, with a drain before its shutdown."""

    def __init__(
        self, app: FastAPI, engine: AsyncEngine, *, drain_timeout_s: float, connection_idle_s: float = 5.0
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                backlog=BACKLOG,
                # Rounded up: 0 would close a connection with its first answer.
                timeout_keep_alive=math.ceil(connection_idle_s),
                timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
            )
        )
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._asked = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._asked:
            self._start_drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal. It may interrupt anything, so all but the end itself is left to the event loop."""
        if self._asked:
            os._exit(128 + sig)
        self.begin_drain()

    def begin_drain(self) -> None:
        """Starts the shutdown. From any thread."""
        self._asked = True
        if self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_and_leave())

    async def _drain_and_leave(self) -> None:
        _log.warning(
            "shutting down: finishing requests in flight, for at most %g s; a further signal ends them at once",
            self._drain_timeout_s,
        )
        try:
            if not await self._engine.drain(self._drain_timeout_s):
                _log.warning("requests were aborted: they took longer than %g s", self._drain_timeout_s)
        finally:
            self.should_exit = True
