"""The loop that owns a core: takes commands, steps, hands on what came of it. The same behind every transport.

Commands are carried out before every step, so that an abort frees what its request holds within a step; with nothing
to compute the loop sleeps on its inbox.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from dibit.engine.core import EngineCore
from dibit.engine.errors import EngineDead
from dibit.engine.isolation import describe
from dibit.engine.messages import Abort, Add, Command, Outputs, Ready, Stop
from dibit.engine.outputs import RequestOutput

logger = logging.getLogger(__name__)

STOPPED = "the engine was stopped"


class Inbox(Protocol):
    def get(self, *, wait: bool) -> Command | None:
        """The next command; without `wait` None when there is none yet."""
        ...


def ready(core: EngineCore) -> Ready:
    return Ready(core.max_model_len, core.tokenizer.vocab_size, core.stats())


def run(core: EngineCore, inbox: Inbox, publish: Callable[[Outputs], None]) -> str:
    """Serves until `Stop`, or until the engine fails; why it ended."""
    try:
        _Loop(core, inbox, publish).run()
    except EngineDead as error:
        logger.critical("%s", error)
        return str(error)
    except BaseException as error:
        logger.critical("the engine's loop failed", exc_info=error)
        return f"the engine has stopped: {describe(error)}"
    return STOPPED


class _Loop:
    def __init__(self, core: EngineCore, inbox: Inbox, publish: Callable[[Outputs], None]) -> None:
        self._core = core
        self._inbox = inbox
        self._publish = publish
        self._streams: dict[str, int] = {}  # of the requests in the core, by their ids
        self._ids: dict[int, str] = {}  # the other way round

    def run(self) -> None:
        while self._take_commands():
            self._report(self._core.step())

    def _take_commands(self) -> bool:
        """Carries out what is in the inbox, sleeping on it while there is no work. False to stop."""
        while True:
            command = self._inbox.get(wait=not self._core.has_work)
            match command:
                case None:
                    return True
                case Add():
                    self._core.submit(command)
                    self._streams[command.request_id] = command.stream
                    self._ids[command.stream] = command.request_id
                case Abort(stream):
                    if stream in self._ids and (output := self._core.abort(self._ids[stream])) is not None:
                        self._report([output])
                case Stop():
                    return False

    def _report(self, outputs: Iterable[RequestOutput]) -> None:
        news = []
        for output in outputs:
            stream = self._streams[output.request_id]
            if output.finished:
                del self._streams[output.request_id], self._ids[stream]
            news.append((stream, output))
        self._publish(Outputs(tuple(news), self._core.stats()))
