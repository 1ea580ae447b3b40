"""How a server reaches its engine: commands go one way, reports the other (messages.py).

`ThreadTransport` runs the engine on a thread of the server's process, `process_transport.ProcessTransport` in a process
of its own. Neither knows requests from answers: that is `AsyncEngine`, which knows neither.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from dibit.engine import core_loop
from dibit.engine.config import EngineConfig
from dibit.engine.core import EngineCore
from dibit.engine.messages import Command, Outputs, Ready, Stop
from dibit.engine.tokenizer import Tokenizer


class Transport(Protocol):
    """An engine that is loaded, and the way to it.

    `on_outputs` is called for every step, then `on_end` once with the reason why nothing more comes; both on one thread
    of the transport's own.
    """

    @property
    def config(self) -> EngineConfig: ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, in the server's process."""
        ...

    @property
    def ready(self) -> Ready: ...

    def start(self, on_outputs: Callable[[Outputs], None], on_end: Callable[[str], None]) -> None:
        """Begins to serve. Once at most."""
        ...

    def send(self, command: Command) -> None:
        """Never waits, and may be called from any thread, by the garbage collector too. What is sent after the end is
        lost. Raises TypeError for values that no message carries."""
        ...

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the engine after the step it is in and waits for `on_end`, at most timeout_s; before `start` too."""
        ...


class ThreadTransport:
    """The engine on a thread. Nobody else may use `core` any more."""

    def __init__(self, core: EngineCore) -> None:
        self.ready = core_loop.ready(core)
        self._core = core
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def config(self) -> EngineConfig:
        return self._core.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._core.tokenizer

    def start(self, on_outputs: Callable[[Outputs], None], on_end: Callable[[str], None]) -> None:
        self._thread = threading.Thread(
            target=lambda: on_end(core_loop.run(self._core, self, on_outputs)), name="dibit-engine", daemon=True
        )
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def stop(self, timeout_s: float | None = None) -> None:
        self.send(Stop())
        if self._thread is not None:
            self._thread.join(timeout_s)

    def get(self, *, wait: bool) -> Command | None:
        """On the engine's thread: see `core_loop.Inbox`."""
        try:
            return self._commands.get(block=wait)
        except queue.Empty:
            return None
