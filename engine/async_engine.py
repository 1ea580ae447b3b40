"""The engine for callers on an asyncio event loop, wherever it runs.

A transport (transport.py) carries commands to the loop that owns the core and brings reports back on a thread of its
own; from there outputs reach their readers by `call_soon_threadsafe`, one call a step. A client that reads slower than
the engine writes gets several tokens at once: its outputs are merged, so that what waits for it is bounded.

Invariant: every stream ends. Either with an output that is `finished`, or by EngineDead with the root cause, or by
being closed, which aborts its request within a step.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from dibit.engine.admission import Admission
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core_loop import STOPPED
from dibit.engine.errors import CapacityError, EngineDead, RequestError
from dibit.engine.messages import Abort, Outputs
from dibit.engine.outputs import EngineStats, RequestOutput, merge
from dibit.engine.tokenizer import Tokenizer
from dibit.engine.transport import Transport

# Outputs that wait for a slow client before further ones are merged into the last of them.
_MAX_PENDING = 16
_RETRY_AFTER_S = (1.0, 120.0)
_DRAIN_POLL_S = 0.02


class _Mailbox:
    """Where the outputs of one request wait for their reader. Used on `loop` only, except for `ended`."""

    def __init__(self, request_id: str, stream: int, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.stream = stream
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


class AsyncEngine:
    """`start`, `generate` and `stop`, around an engine that nobody else uses.

    `generate`, `abort`, `stats` and `drain` are for event loops; `start` and `stop` for anywhere.
    """

    def __init__(self, transport: Transport, *, model_name: str = "model") -> None:
        self.model_name = model_name
        self._transport = transport
        self._admission = Admission(transport.ready.max_model_len, transport.ready.vocab_size)
        self._max_in_flight = transport.config.max_num_seqs + transport.config.max_queued
        self._streams = itertools.count()
        self._in_flight: dict[str, _Mailbox] = {}  # by request id
        self._mailboxes: dict[int, _Mailbox] = {}  # the same by stream
        self._stats = transport.ready.stats
        self._started = False
        self._dead: str | None = None
        self._draining = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self._transport.tokenizer

    @property
    def config(self) -> EngineConfig:
        return self._transport.config

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return self._admission.max_model_len

    @property
    def healthy(self) -> str | None:
        """None when requests are served; otherwise why not."""
        if self._dead is not None:
            return self._dead
        return None if self._started else "the engine has not been started"

    @property
    def draining(self) -> bool:
        return self._draining

    def start(self) -> None:
        """Begins to serve; does nothing when it does already. Raises EngineDead when it has stopped."""
        if self._dead is not None:
            raise EngineDead(self._dead)
        if not self._started:
            self._started = True
            self._transport.start(self._on_outputs, self._on_end)

    def stop(self, timeout_s: float | None = None) -> None:
        """Stops after the step that is under way; requests in flight end with EngineDead."""
        if not self._started:
            self._dead = self._dead or STOPPED
        self._transport.stop(timeout_s)

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
        add = self._admission.admit(request_id, prompt_ids, params, cache_salt=cache_salt, stream=next(self._streams))
        if len(self._in_flight) >= self._max_in_flight:
            wait_s = self.retry_after_s()
            raise CapacityError(
                f"{len(self._in_flight)} requests are in flight, as many as are accepted "
                f"(max_num_seqs + max_queued); try again in {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        mailbox = _Mailbox(request_id, add.stream, asyncio.get_running_loop())
        if self._in_flight.setdefault(request_id, mailbox) is not mailbox:
            raise RequestError(f"request id {request_id!r} is in use; choose another", param="request_id")
        self._mailboxes[add.stream] = mailbox
        try:
            self._transport.send(add)
        except BaseException:
            self._remove(mailbox)
            raise
        if self._dead is not None:
            # The end may have come between the first look and the mailbox, which then nobody buries.
            self._remove(mailbox)
            raise EngineDead(self._dead)
        return RequestStream(self, mailbox)

    def abort(self, request_id: str) -> None:
        """Ends a request: its stream gets a last output with finish_reason ABORT. Unknown ids do nothing."""
        if (mailbox := self._in_flight.get(request_id)) is not None:
            self._transport.send(Abort(mailbox.stream))

    def stats(self) -> EngineStats:
        """As of the last step, with the requests that are still on their way to the engine counted as waiting."""
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
        # In this order: who takes the free id comes after the abort.
        self._transport.send(Abort(mailbox.stream))
        self._remove(mailbox)

    def _remove(self, mailbox: _Mailbox) -> None:
        self._mailboxes.pop(mailbox.stream, None)
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

    def _on_outputs(self, outputs: Outputs) -> None:
        """On the transport's thread: sends outputs to the event loops of their readers, one call for each loop."""
        # First, so that whoever has read an output finds it in the figures.
        self._stats = outputs.stats
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, RequestOutput]]] = {}
        for stream, output in outputs.news:
            # None when its reader has gone.
            if (mailbox := self._mailboxes.get(stream)) is not None:
                news.setdefault(mailbox.loop, []).append((mailbox, output))
        for loop, batch in news.items():
            if not _call(loop, self._deliver, batch):
                for mailbox, _ in batch:
                    mailbox.ended = True
                    self._forget(mailbox)

    def _on_end(self, why: str) -> None:
        """On the transport's thread."""
        self._dead = why
        for mailbox in list(self._mailboxes.values()):
            _call(mailbox.loop, self._bury, mailbox, EngineDead(why))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> bool:
    """Has `loop` call function(*args) soon; False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True
