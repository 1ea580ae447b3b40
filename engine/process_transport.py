"""The engine in a process of its own: HTTP, JSON and tokenizing never wait for Python that the model needs, nor it for
them.

Messages go over one ZeroMQ PAIR socket (https://rfc.zeromq.org/spec/31/) in a directory that only this user can enter,
and which is removed as soon as both ends are there. The other end is engine_process.py.

Neither process outlives the other: the engine's standard input is a pipe whose end is open in the server alone, so that
it closes with the server, however that ends; and the server looks for the end of its child all the time.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

import msgspec
import zmq

from dibit.engine.config import EngineConfig
from dibit.engine.core_loop import STOPPED
from dibit.engine.errors import ConfigError, EngineDead
from dibit.engine.isolation import describe
from dibit.engine.messages import MAX_REPORTS, Command, Failed, Launch, Outputs, Ready, Report, Stop, encode
from dibit.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BUILD_CORE = "dibit.engine.build:build_core"
STOP_TIMEOUT_S = 10.0
# How often is looked whether the process runs; its end is noticed within twice that.
_LIFE_POLL_MS = 200
_LEAVE_TIMEOUT_S = 1.0
_KILL_TIMEOUT_S = 5.0


class ProcessTransport:
    """See `transport.Transport`. One thread here sends and receives."""

    def __init__(self, child: _Child, ready: Ready, config: EngineConfig, tokenizer: Tokenizer) -> None:
        """See `launch`."""
        self.ready = ready
        self.config = config
        self.tokenizer = tokenizer
        self._child = child
        self._commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # A byte in it wakes the thread: sockets of ZeroMQ are for one thread, and a lock would be no match for the
        # garbage collector, which may send while this thread sends.
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._thread: threading.Thread | None = None
        self._stopping = False

    @classmethod
    def launch(
        cls,
        model: str,
        config: EngineConfig,
        *,
        load_tokenizer: Callable[[], Tokenizer],
        factory: str = BUILD_CORE,
    ) -> ProcessTransport:
        """Starts the process and waits until it has loaded the model, with `load_tokenizer` called here meanwhile.

        factory  "module:function" that makes an EngineCore from model and config, found by importing it there

        Raises what the factory and load_tokenizer raise, or EngineDead when the process ends without a word.
        """
        child = _Child(model, config, factory)
        try:
            tokenizer = load_tokenizer()
            return cls(child, child.wait_until_ready(), config, tokenizer)
        except BaseException:
            child.close()
            raise

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._child.process.pid

    def start(self, on_outputs: Callable[[Outputs], None], on_end: Callable[[str], None]) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(on_outputs, on_end), name="dibit-engine-messages", daemon=True
        )
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(encode(command))
        # A full pipe wakes as well as one more byte; a closed one means that nobody is there.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def stop(self, timeout_s: float | None = None) -> None:
        """See `Transport`; after timeout_s (None: 10) the process is killed."""
        if self._thread is None:
            self._close()
            return
        self._stopping = True
        self.send(Stop())
        timeout_s = STOP_TIMEOUT_S if timeout_s is None else timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine process is killed: it did not stop within %g s", timeout_s)
            self._child.process.kill()
            self._thread.join(_KILL_TIMEOUT_S)

    def _run(self, on_outputs: Callable[[Outputs], None], on_end: Callable[[str], None]) -> None:
        try:
            why = self._serve(on_outputs)
        except BaseException as error:
            logger.critical("the exchange with the engine process failed", exc_info=error)
            why = f"the engine cannot be reached: {describe(error)}"
        on_end(why)
        self._close()

    def _serve(self, on_outputs: Callable[[Outputs], None]) -> str:
        """Sends and receives until the end; why it came."""
        child = self._child
        poller = zmq.Poller()
        poller.register(child.socket, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while True:
            # Asked first: what it said before its end has come when nothing has for a while.
            why = child.ended()
            events = dict(poller.poll(_LIFE_POLL_MS))
            if self._woken.fileno() in events:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                with contextlib.suppress(queue.Empty):
                    while True:
                        child.send(self._commands.get_nowait())
            if child.socket in events:
                match child.receive():
                    case Outputs() as outputs:
                        on_outputs(outputs)
                    case Failed(message=message):
                        return message
            if not events and why is not None:
                if self._stopping:
                    return STOPPED
                logger.critical("%s", why)
                return why

    def _close(self) -> None:
        self._child.close()
        self._wake.close()
        self._woken.close()


class _Child:
    """The process and the socket to it. For one thread at a time."""

    def __init__(self, model: str, config: EngineConfig, factory: str) -> None:
        try:
            self._directory = tempfile.mkdtemp(prefix="dibit-engine-")
        except OSError as error:
            raise ConfigError(f"the engine process needs a directory for its socket: {error}; set TMPDIR") from error
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.PAIR)
        # Commands are as many as there are requests, which are bounded elsewhere.
        self.socket.sndhwm = 0
        self.socket.rcvhwm = MAX_REPORTS
        address = f"ipc://{self._directory}/messages"
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self._close_socket()
            raise ConfigError(
                f"the engine process cannot have a socket in {self._directory}: {error}; set TMPDIR to a directory "
                "with a short name"
            ) from error
        self._decoder = msgspec.msgpack.Decoder(Report)
        launch = Launch(address, factory, model, config, logging.getLogger().getEffectiveLevel())
        try:
            line = msgspec.json.encode(launch) + b"\n"
            self.process = subprocess.Popen(
                # -P: a folder called `kernels` where the server was started is not to be imported.
                [sys.executable, "-P", "-m", "dibit.engine.engine_process"],
                stdin=subprocess.PIPE,
                # Ctrl-C is for the server alone, which then lets requests end.
                process_group=0,
            )
        except BaseException:
            self._close_socket()
            raise
        assert self.process.stdin is not None
        # A process that ends at once is found by who waits for it.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def wait_until_ready(self) -> Ready:
        """Raises the error that the process met while it loaded."""
        while True:
            why = self.ended()
            if self.socket.poll(_LIFE_POLL_MS):
                match self.receive():
                    case Ready() as ready:
                        # Both ends are there, and nobody else is to come.
                        shutil.rmtree(self._directory, ignore_errors=True)
                        return ready
                    case Failed() as failed:
                        raise failed.exception()
            elif why is not None:
                raise EngineDead(why)

    def send(self, command: bytes) -> None:
        # Again: the process has ended, which is noticed soon.
        with contextlib.suppress(zmq.Again):
            self.socket.send(command, zmq.NOBLOCK)

    def receive(self) -> Report:
        report: Report = self._decoder.decode(self.socket.recv())
        return report

    def ended(self) -> str | None:
        """How the process ended; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        if status >= 0:
            return f"the engine process has ended with status {status}"
        why = f"the engine process was killed by {signal.Signals(-status).name}"
        return f"{why}, as the system does when memory runs out" if -status == signal.SIGKILL else why

    def close(self) -> None:
        """Ends the process if it runs, and leaves nothing behind."""
        assert self.process.stdin is not None
        # What was not written has nobody to read it.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        # It leaves by itself after `Failed`, and when its standard input has closed.
        try:
            self.process.wait(_LEAVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(_KILL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.error("the engine process %d cannot be killed", self.process.pid)
        self._close_socket()

    def _close_socket(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)
