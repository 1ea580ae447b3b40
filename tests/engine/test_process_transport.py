"""The engine's process: how it starts, how it ends, and what it leaves behind. test_async_engine.py has the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_factory import FACTORY, TESTS, launched
from streams import greedy, idle, read, run, until

from dibit.engine.async_engine import AsyncEngine
from dibit.engine.config import EngineConfig
from dibit.engine.errors import CheckpointError, ConfigError, EngineDead
from dibit.engine.messages import Outputs
from dibit.engine.outputs import merge
from dibit.engine.process_transport import ProcessTransport
from dibit.engine.request import FinishReason
from fakes import ByteTokenizer, solo_tokens


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are made; nothing is there after any test, nor any process."""
    # Short: names of sockets may have some hundred characters.
    directory = Path(os.path.relpath(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    before = set(psutil.Process().children())
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    assert set(psutil.Process().children()) <= before


@contextlib.contextmanager
def engine_in_process(**runner: float) -> Iterator[tuple[AsyncEngine, ProcessTransport]]:
    transport = launched(settings={"max_num_seqs": 2}, step_delay_s=0.001, **runner)
    engine = AsyncEngine(transport)
    engine.start()
    try:
        yield engine, transport
    finally:
        engine.stop(timeout_s=10)


def test_a_process_that_is_killed_ends_every_stream_with_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        with engine_in_process() as (engine, transport):
            streams = [engine.generate(f"r{i}", [i], greedy(250)) for i in range(5)]
            await anext(streams[0])
            os.kill(transport.pid, signal.SIGKILL)
            start_s = time.monotonic()
            for stream in streams:
                with pytest.raises(EngineDead, match=r"killed by SIGKILL, as the system does when memory runs out"):
                    await read(stream)
            assert time.monotonic() - start_s < 3  # about 0.4 s on a machine that is not busy
            assert "SIGKILL" in (engine.healthy or "")
            with pytest.raises(EngineDead, match="SIGKILL"):
                engine.generate("late", [1], greedy())
            assert await engine.drain(1.0)

    run(test)
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]


def test_an_engine_that_dies_says_of_what() -> None:
    async def test() -> None:
        with engine_in_process() as (engine, _):
            other = engine.generate("other", [1], greedy(200))
            await anext(other)
            for stream in (engine.generate("fatal", [1], greedy()), other):
                with pytest.raises(EngineDead, match="MemoryError: no more"):
                    await read(stream)

    run(test)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("broken", CheckpointError, "the file is broken;\nmend it"),
        ("too large", MemoryError, "no room"),
        ("surprising", EngineDead, "the engine could not be loaded: KeyError: 'lm_head'"),
        ("fatal", EngineDead, "the engine process has ended with status 3"),
    ],
)
def test_what_goes_wrong_while_loading_is_raised_here(model: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        launched(model)
    assert (type(caught.value), str(caught.value)) == (kind, message)


def test_a_tokenizer_that_cannot_be_loaded_ends_the_process() -> None:
    def broken() -> ByteTokenizer:
        raise CheckpointError("no tokenizer")

    with pytest.raises(CheckpointError, match="no tokenizer"):
        ProcessTransport.launch("slow", EngineConfig(), load_tokenizer=broken, factory=FACTORY)


def test_a_place_for_sockets_that_does_not_do(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        launched()
    deep.rmdir()
    with pytest.raises(ConfigError, match="set TMPDIR"):
        launched()


def test_it_starts_with_nothing_left_on_disk_and_stops_without_being_started(temporary: Path) -> None:
    transport = launched()
    assert list(temporary.iterdir()) == []
    transport.stop()
    transport.stop()
    assert not psutil.pid_exists(transport.pid)


def test_a_process_that_does_not_stop_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        with engine_in_process() as (engine, transport):
            stream = engine.generate("hanging", [1], greedy())
            await asyncio.sleep(0.2)
            start_s = time.monotonic()
            engine.stop(timeout_s=0.3)
            assert time.monotonic() - start_s < 2
            assert not psutil.pid_exists(transport.pid)
            with pytest.raises(EngineDead, match="the engine was stopped"):
                await read(stream)

    run(test)
    assert "it did not stop within 0.3 s" in caplog.text


def test_signals_for_the_whole_group_are_not_for_it() -> None:
    async def test() -> None:
        with engine_in_process() as (engine, transport):
            assert os.getpgid(transport.pid) != os.getpgid(0)
            stream = engine.generate("a", [1], greedy(30))
            await anext(stream)
            os.kill(transport.pid, signal.SIGINT)
            os.kill(transport.pid, signal.SIGTERM)
            assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH

    run(test)


def test_processes_started_later_hold_no_end_of_its_pipes() -> None:
    before = open_files()
    with engine_in_process():
        new = open_files() - before
        assert new
        assert not [fd for fd in new if os.get_inheritable(fd)]


def open_files() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found.add(int(name))
    return found


def test_a_server_that_is_late_keeps_the_engine_waiting() -> None:
    """Reports that nobody takes are bounded in number: the engine waits, and nothing is lost."""

    async def test() -> None:
        transport = launched(settings={"max_num_seqs": 1, "max_queued": 10_000})
        engine = AsyncEngine(transport)
        late = threading.Event()
        late.set()
        deliver = engine._on_outputs

        def slow(outputs: Outputs) -> None:
            late.wait()
            deliver(outputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_on_outputs", slow)
            engine.start()
        try:
            # Two reports each: far more than wait at both ends and in the system's buffers.
            streams = [engine.generate(str(i), [i % 256], greedy(2)) for i in range(700)]
            last = engine.generate("fatal", [0], greedy())
            await until(transport._commands.empty)
            late.clear()
            child = psutil.Process(transport.pid)
            before_s, spent_s = -1.0, 0.0
            while spent_s > before_s:
                # Longer than the end of a process takes that waits for its last reports to be read.
                await asyncio.sleep(1.2)
                before_s, spent_s = spent_s, sum(child.cpu_times()[:2])
            assert child.status() == psutil.STATUS_SLEEPING, "it has not come to the last request"
            late.set()
            for i, stream in enumerate(streams):
                assert list(merge(await read(stream)).token_ids) == solo_tokens([i % 256], 2)
            with pytest.raises(EngineDead, match="no more"):
                await read(last)
        finally:
            late.set()
            engine.stop()

    run(test)


SERVER = """
import sys, time
from engine_factory import FACTORY
from fakes import ByteTokenizer
from dibit.engine.config import EngineConfig
from dibit.engine.process_transport import ProcessTransport
transport = ProcessTransport.launch(sys.argv[1], EngineConfig(), load_tokenizer=ByteTokenizer, factory=FACTORY)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("model", ["{}", "slow"])
def test_it_does_not_outlive_its_server(model: str, temporary: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(TESTS), "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", SERVER, model], stdout=subprocess.PIPE, env=env) as server:
        assert server.stdout is not None
        me = psutil.Process(server.pid)
        if model == "{}":
            assert server.stdout.readline() == b"ready\n"
        else:
            wait_until_loading(me)
        [child] = me.children()
        server.kill()
    psutil.wait_procs([child], timeout=2)
    assert not child.is_running()


def wait_until_loading(server: psutil.Process) -> None:
    """Until the child sleeps with its two threads or more: its watch over the server among them."""
    end_s = time.monotonic() + 10
    while not [child for child in server.children() if child.num_threads() > 3]:
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_its_log_is_the_servers(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, level: int
) -> None:
    caplog.set_level(level)
    launched().stop()
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == (["INFO loading {}"] if level == logging.INFO else [])


def test_an_idle_engine_costs_nothing() -> None:
    async def test() -> None:
        with engine_in_process() as (engine, transport):
            await read(engine.generate("a", [1], greedy()))
            assert idle(engine)
            child = psutil.Process(transport.pid)
            before_s = time.process_time() + sum(child.cpu_times()[:2])
            await asyncio.sleep(0.5)
            assert time.process_time() + sum(child.cpu_times()[:2]) - before_s < 0.05

    run(test)
