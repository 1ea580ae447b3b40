"""The engine's process, started by process_transport.py: reads a `Launch` from its standard input, loads the model, and
serves until it is told to stop or the server is gone."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import msgspec
import zmq

from dibit.engine import core_loop
from dibit.engine.config import LOG_FORMAT
from dibit.engine.core import EngineCore
from dibit.engine.errors import DibitError, EngineDead
from dibit.engine.messages import MAX_REPORTS, Command, Failed, Launch, Report, encode

logger = logging.getLogger(__name__)

# Time that the last messages have to reach the server.
_LINGER_MS = 1000


def main() -> None:
    # The server decides when to end; a supervisor may tell every process of the group at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not (line := sys.stdin.buffer.readline()):
        return
    launch = msgspec.json.decode(line, type=Launch)
    logging.basicConfig(level=launch.log_level, format=LOG_FORMAT, stream=sys.stderr)
    _leave_with_the_server(Path(launch.address.removeprefix("ipc://")).parent)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.linger = _LINGER_MS
        socket.sndhwm = MAX_REPORTS
        socket.connect(launch.address)
        _serve(launch, _Messages(socket))


def _serve(launch: Launch, messages: _Messages) -> None:
    try:
        core = _build(launch)
    except BaseException as error:
        if not isinstance(error, DibitError | MemoryError):
            logger.critical("the engine could not be loaded", exc_info=error)
        messages.put(Failed.of(error))
        return
    messages.put(core_loop.ready(core))
    messages.put(Failed(EngineDead.__name__, core_loop.run(core, messages, messages.put)))


def _build(launch: Launch) -> EngineCore:
    module, _, function = launch.factory.partition(":")
    core: EngineCore = getattr(importlib.import_module(module), function)(launch.model, launch.config)
    return core


class _Messages:
    """Commands from the server, reports to it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(Command)

    def get(self, *, wait: bool) -> Command | None:
        """See `core_loop.Inbox`."""
        try:
            command: Command = self._decoder.decode(self._socket.recv(0 if wait else zmq.NOBLOCK))
        except zmq.Again:
            return None
        return command

    def put(self, report: Report) -> None:
        """Waits while the server is too far behind."""
        self._socket.send(encode(report))


def _leave_with_the_server(directory: Path) -> None:
    """Ends this process when the other end of its standard input closes. Processes started here get no part of it."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        os.read(lifeline, 1)
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="dibit-server-watch", daemon=True).start()


if __name__ == "__main__":
    main()
