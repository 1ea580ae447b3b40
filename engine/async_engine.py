"""The engine behind a thread, for callers on an asyncio event loop.

One thread owns the core; nothing else touches it. Commands go in through a queue that the thread empties before every
step and sleeps on when there is nothing to do; outputs go back by `call_soon_threadsafe`, one call a step. A client
that reads slower than the engine writes gets several tokens at once: its outputs are merged, so that what waits for
it is bounded.

Invariant: every stream ends. Either with an output that is `finished`, or by EngineDead with the root cause, or by
being closed, which aborts its request within a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore, Ticket
from dibit.engine.errors import CapacityError, EngineDead, RequestError
from dibit.engine.outputs import EngineStats, RequestOutput, merge
from dibit.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Outputs that wait for a slow client before further ones are merged into the last of them.
_MAX_PENDING = 16
_RETRY_AFTER_S = (1.0, 120.0)
_DRAIN_POLL_S = 0.02


class _Mailbox:
    """Where the outputs of one request wait for their reader. Used on `loop` only, except for `ended`."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.pending: deque[RequestOutput] = deque()
        self.wake = asyncio.Event()
        self.error: EngineDead | None = None
        self.ended = False  # nothing more arrives

    def push(self, output: RequestOutput) -> None:
        if self.ended:
            return
        if len(self.pending) < _MAX_PENDING:
            self.pending.append(output)
        else:
            self.pending[-1] = merge([self.pending[-1], output])
        self.ended = output.finished
        self.wake.set()

    def fail(self, error: EngineDead) -> None:
        if not self.ended:
            self.error, self.ended = error, True
            self.wake.set()


class RequestStream:
    """Outputs of one request, as an async iterator for one task.

    Cancelling the task that waits in it, `aclose()`, or dropping it aborts the request. Raises EngineDead when the
    engine stops before the request ends.
    """

    def __init__(self, engine: AsyncEngine, mailbox: _Mailbox) -> None:
        self._engine = engine
        self._mailbox = mailbox

    @property
    def request_id(self) -> str:
        return self._mailbox.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        mailbox = self._mailbox
        while not mailbox.pending:
            if mailbox.ended:
                error, mailbox.error = mailbox.error, None
                raise error or StopAsyncIteration
            mailbox.wake.clear()
            try:
                await mailbox.wake.wait()
            except asyncio.CancelledError:
                self._close()
                raise
        return mailbox.pending.popleft()

    async def aclose(self) -> None:
        """Ends the iteration; aborts the request if it has not ended."""
        self._close()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        self._mailbox.pending.clear()
        self._mailbox.error = None
        if not self._mailbox.ended:
            self._mailbox.ended = True
            self._engine._forget(self._mailbox)


@dataclass(frozen=True, slots=True)
class _Add:
    ticket: Ticket
    mailbox: _Mailbox


@dataclass(frozen=True, slots=True)
class _Abort:
    """By id, with a last output to its reader; or silently, for a reader that has gone."""

    request_id: str
    gone: _Mailbox | None = None


class _Stop:
    pass


_Command = _Add | _Abort | _Stop


class AsyncEngine:
    """`start`, `generate` and `stop`, around a core that nobody else uses.

    `generate`, `abort`, `stats` and `drain` are for event loops; `start` and `stop` for anywhere.
    """

    def __init__(self, core: EngineCore, *, model_name: str = "model") -> None:
        self.model_name = model_name
        self._core = core
        self._max_in_flight = core.config.max_num_seqs + core.config.max_queued
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._in_flight: dict[str, _Mailbox] = {}  # as the callers see it
        self._routes: dict[str, _Mailbox] = {}  # as the engine's thread sees it
        self._stats = core.stats()
        self._thread: threading.Thread | None = None
        self._dead: str | None = None
        self._draining = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self._core.tokenizer

    @property
    def config(self) -> EngineConfig:
        return self._core.config

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return self._core.max_model_len

    @property
    def healthy(self) -> str | None:
        """None when requests are served; otherwise why not."""
        if self._dead is not None:
            return self._dead
        return None if self._thread is not None else "the engine has not been started"

    @property
    def draining(self) -> bool:
        return self._draining

    def start(self) -> None:
        """Starts the thread; does nothing when it runs. Raises EngineDead when it has stopped."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dibit-engine", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Stops the thread after the step it is in; requests in flight end with EngineDead."""
        if self._thread is None:
            self._dead = self._dead or "the engine was stopped"
            return
        self._inbox.put(_Stop())
        self._thread.join(timeout_s)

    def generate(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str = ""
    ) -> RequestStream:
        """Submits a request at once; its outputs are read from the stream returned.

        Raises RequestError, ContextLengthError (it can never fit), CapacityError (no room now) or EngineDead.
        """
        if (why := self.healthy) is not None:
            raise EngineDead(why)
        if self._draining:
            raise CapacityError("the server is shutting down; send the request elsewhere", retry_after_s=1.0)
        ticket = self._core.prepare(request_id, prompt_ids, params, cache_salt=cache_salt)
        if len(self._in_flight) >= self._max_in_flight:
            wait_s = self.retry_after_s()
            raise CapacityError(
                f"{len(self._in_flight)} requests are in flight, as many as are accepted "
                f"(max_num_seqs + max_queued); try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        mailbox = _Mailbox(request_id, asyncio.get_running_loop())
        if self._in_flight.setdefault(request_id, mailbox) is not mailbox:
            raise RequestError(f"request id {request_id!r} is in use; choose another", param="request_id")
        self._inbox.put(_Add(ticket, mailbox))
        if self._dead is not None:
            # The thread may have emptied the inbox for the last time between the first look and the put.
            self._in_flight.pop(request_id, None)
            raise EngineDead(self._dead)
        return RequestStream(self, mailbox)

    def abort(self, request_id: str) -> None:
        """Ends a request: its stream gets a last output with finish_reason ABORT. Unknown ids do nothing."""
        self._inbox.put(_Abort(request_id))

    def stats(self) -> EngineStats:
        """As of the last step, with the requests that still lie in the inbox counted as waiting."""
        stats = self._stats
        unseen = max(0, len(self._in_flight) - stats.running - stats.waiting)
        return replace(stats, waiting=stats.waiting + unseen)

    def retry_after_s(self) -> float:
        """When a request refused now may find room: the time to compute the prompts that are queued."""
        stats = self._stats
        low, high = _RETRY_AFTER_S
        wait_s = stats.backlog_tokens / stats.prefill_tok_s if stats.prefill_tok_s else low
        return min(max(wait_s, low), high)

    async def drain(self, timeout_s: float) -> bool:
        """Accepts nothing more and waits for the requests in flight; aborts those left after timeout_s.

        True when all ended by themselves.
        """
        self._draining = True
        end_s = time.monotonic() + timeout_s
        while self._in_flight and time.monotonic() < end_s:
            await asyncio.sleep(_DRAIN_POLL_S)
        left = list(self._in_flight)
        for request_id in left:
            self.abort(request_id)
        while self._in_flight and self._dead is None:
            await asyncio.sleep(_DRAIN_POLL_S)
        return not left

    def _forget(self, mailbox: _Mailbox) -> None:
        """The reader has gone: aborts its request. Called from any thread, the garbage collector's included."""
        self._remove(mailbox)
        self._inbox.put(_Abort(mailbox.request_id, gone=mailbox))

    def _remove(self, mailbox: _Mailbox) -> None:
        if self._in_flight.get(mailbox.request_id) is mailbox:
            del self._in_flight[mailbox.request_id]

    def _deliver(self, news: list[tuple[_Mailbox, RequestOutput]]) -> None:
        """On the readers' event loop."""
        for mailbox, output in news:
            if output.finished:
                self._remove(mailbox)
            mailbox.push(output)

    def _bury(self, mailbox: _Mailbox, error: EngineDead) -> None:
        """On the reader's event loop."""
        self._remove(mailbox)
        mailbox.fail(error)

    def _run(self) -> None:
        """The engine's thread."""
        why = "the engine was stopped"
        try:
            while self._take_commands():
                self._route(self._core.step())
                self._stats = self._core.stats()
        except EngineDead as error:
            logger.critical("%s", error)
            why = str(error)
        except BaseException as error:
            logger.critical("the engine's loop failed", exc_info=error)
            why = f"the engine has stopped: {type(error).__name__}: {error}"
        self._dead = why
        orphans = list(self._routes.values())
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                if isinstance(command, _Add):
                    orphans.append(command.mailbox)
        for mailbox in orphans:
            _call(mailbox.loop, self._bury, mailbox, EngineDead(why))

    def _take_commands(self) -> bool:
        """Carries out what is in the inbox, sleeping on it while there is no work. False to stop."""
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                if self._core.has_work:
                    return True
                self._stats = self._core.stats()
                command = self._inbox.get()
            match command:
                case _Add(ticket, mailbox):
                    self._core.submit(ticket)
                    self._routes[mailbox.request_id] = mailbox
                case _Abort(request_id, None):
                    if (output := self._core.abort(request_id)) is not None:
                        self._route([output])
                case _Abort(request_id, gone):
                    if self._routes.get(request_id) is gone:
                        del self._routes[request_id]
                        self._core.abort(request_id)
                case _Stop():
                    return False

    def _route(self, outputs: list[RequestOutput]) -> None:
        """Sends outputs to the event loops of their readers, one call for each loop."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, RequestOutput]]] = {}
        for output in outputs:
            mailbox = self._routes[output.request_id]
            if output.finished:
                del self._routes[output.request_id]
            news.setdefault(mailbox.loop, []).append((mailbox, output))
        for loop, batch in news.items():
            if not _call(loop, self._deliver, batch):
                for mailbox, _ in batch:
                    mailbox.ended = True
                    self._forget(mailbox)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> bool:
    """Has `loop` call function(*args) soon; False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True
