"""AsyncEngine over a fake core, on a thread and in a process: streams, aborts, back-pressure, draining, death."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from engine_factory import launched, threaded
from streams import greedy, idle, read, run, until

from dibit.engine.async_engine import AsyncEngine, RequestStream
from dibit.engine.config import SamplingParams
from dibit.engine.errors import CapacityError, ContextLengthError, EngineDead, RequestError
from dibit.engine.outputs import merge
from dibit.engine.request import FinishReason
from dibit.engine.step import Step
from dibit.engine.transport import ThreadTransport, Transport
from fakes import FakeRunner, fake_core, solo_tokens


@pytest.fixture(scope="module", params=["thread", "process"])
def engine(request: pytest.FixtureRequest) -> Iterator[AsyncEngine]:
    """One engine for every test that wants nothing special of it, and leaves it idle."""
    make: Callable[..., Transport] = {"thread": threaded, "process": launched}[request.param]
    engine = AsyncEngine(make(settings={"max_num_seqs": 4}, step_delay_s=0.001))
    engine.start()
    yield engine
    engine.stop(timeout_s=10)
    assert engine.healthy == "the engine was stopped"


@asynccontextmanager
async def engine_over(runner: FakeRunner | None = None, **settings: Any) -> AsyncIterator[AsyncEngine]:
    async with started(AsyncEngine(ThreadTransport(fake_core(runner, **settings)), model_name="fake")) as engine:
        yield engine


@asynccontextmanager
async def started(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(timeout_s=10)


def test_streams_side_by_side_give_their_own_tokens_one_by_one(engine: AsyncEngine) -> None:
    async def test() -> None:
        before = engine.stats().finished
        streams = [engine.generate(f"r{i}", [i], greedy(9)) for i in range(10)]
        for i, outputs in enumerate(await asyncio.gather(*map(read, streams))):
            assert [len(output.token_ids) for output in outputs] == [1] * 9
            assert list(merge(outputs).token_ids) == solo_tokens([i], 9)
            assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert engine.stats().finished - before == 10, "the figures are those of the last output"
        assert idle(engine)
        assert engine.healthy is None

    run(test)


def test_a_request_joins_the_running_ones_at_the_next_step() -> None:
    async def test() -> None:
        runner = FakeRunner(step_delay_s=0.03)
        async with engine_over(runner) as engine:
            first = engine.generate("first", [1], greedy(100))
            await anext(first)
            before = len(runner.steps)
            outputs = await read(engine.generate("second", [2], greedy(1)))
            assert len(outputs) == 1
            seen = [i for i, step in enumerate(runner.steps) if any(c.request.id == "second" for c in step.chunks)]
            assert seen[0] - before <= 2

    run(test)


def test_an_idle_engine_sleeps() -> None:
    async def test() -> None:
        async with engine_over() as engine:
            await read(engine.generate("a", [1], greedy()))
            await until(lambda: idle(engine))
            before_s = time.process_time()
            await asyncio.sleep(0.2)
            assert time.process_time() - before_s < 0.1

    run(test)


def test_what_cannot_be_served_is_refused_at_submission(engine: AsyncEngine) -> None:
    async def test() -> None:
        with pytest.raises(ContextLengthError, match="256 tokens; 306 were requested"):
            engine.generate("a", [1] * 300, greedy())
        with pytest.raises(RequestError, match="empty"):
            engine.generate("a", [], greedy())
        stream = engine.generate("a", [1], greedy(50))
        with pytest.raises(RequestError, match="'a' is in use"):
            engine.generate("a", [1], greedy())
        await stream.aclose()
        await until(lambda: idle(engine))


def test_whatever_a_request_may_hold_reaches_the_engine(engine: AsyncEngine) -> None:
    async def test() -> None:
        params = SamplingParams(
            seed=2**64 - 1, max_tokens=3, top_k=2**63 - 1, logit_bias={65: 1.5}, stop=("никогда", "\0"), logprobs=2
        )
        outputs = await read(engine.generate("Ж", np.array([257, 0]), params, cache_salt="s"))
        assert outputs[-1].num_output == 3
        assert all(output.logprobs is not None and len(output.logprobs[0].top) == 2 for output in outputs)

    run(test)


def test_a_full_queue_says_when_to_come_back() -> None:
    async def test() -> None:
        runner = FakeRunner(step_delay_s=0.01, num_blocks=400, max_model_len=1000)
        async with engine_over(runner, max_num_seqs=1, max_queued=2, max_batch_tokens=4) as engine:
            await read(engine.generate("warm", [5] * 8, greedy(1)))
            streams = [engine.generate(f"r{i}", [i] * 300, greedy(1)) for i in range(3)]
            await anext_soon(engine, streams[0])
            with pytest.raises(CapacityError, match="3 requests are in flight") as caught:
                engine.generate("r3", [1], greedy())
            # About 900 tokens at about 4 per 10 ms.
            assert 1.0 <= caught.value.retry_after_s <= 10.0
            assert engine.stats().waiting == 2
            await streams[2].aclose()
            again = engine.generate("r3", [1], greedy(1))
            for stream in (*streams[:2], again):
                await stream.aclose()

    async def anext_soon(engine: AsyncEngine, stream: RequestStream) -> None:
        await until(lambda: engine.stats().backlog_tokens > 500)

    run(test)


def test_who_takes_the_id_of_a_reader_that_left_gets_nothing_of_it(engine: AsyncEngine) -> None:
    async def test() -> None:
        before = engine.stats().aborted
        for i in range(20):
            stream = engine.generate("a", [1], greedy(200))
            if i % 2:
                await anext(stream)
            await stream.aclose()
        again = await read(engine.generate("a", [2], greedy(3)))
        assert list(merge(again).token_ids) == solo_tokens([2], 3)
        assert engine.stats().aborted - before == 20

    run(test)


@pytest.mark.parametrize("how", ["aclose", "cancel", "break", "drop", "with"])
def test_a_reader_that_leaves_frees_its_request_within_a_step(how: str) -> None:
    async def test() -> None:
        runner = FakeRunner(step_delay_s=0.02)
        async with engine_over(runner) as engine:
            other = engine.generate("other", [9], greedy(200))
            stream = engine.generate("a", [1], greedy(200))
            await anext(stream)
            if how == "aclose":
                await stream.aclose()
            elif how == "cancel":
                task = asyncio.ensure_future(read(stream))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "with":
                async with stream:
                    pass
            before = len(runner.steps)
            del stream
            await until(lambda: engine.stats().aborted == 1)
            late = [s for s in runner.steps[before + 2 :] if any(c.request.id == "a" for c in s.chunks)]
            assert not late
            assert not (await anext(other)).finished
            again = await read(engine.generate("a", [1], greedy(3)))
            assert list(merge(again).token_ids) == solo_tokens([1], 3), "the id is free again, and nothing is mixed up"
            await other.aclose()
            await until(lambda: idle(engine))

    run(test)


def test_a_reader_may_leave_when_its_request_has_just_ended(engine: AsyncEngine) -> None:
    async def test() -> None:
        before = engine.stats()
        stream = engine.generate("a", [1], greedy(3))
        while engine.stats().finished == before.finished:
            time.sleep(0.001)  # without giving way to the event loop, so that nothing is delivered yet
        await stream.aclose()
        again = await read(engine.generate("a", [1], greedy(3)))
        assert list(merge(again).token_ids) == solo_tokens([1], 3)
        assert engine.stats().aborted == before.aborted

    run(test)


def test_a_closed_stream_gives_nothing_more(engine: AsyncEngine) -> None:
    async def test() -> None:
        stream = engine.generate("a", [1], greedy(50))
        await anext(stream)
        await stream.aclose()
        assert await read(stream) == []

    run(test)


def test_abort_by_id_ends_the_stream_with_a_reason(engine: AsyncEngine) -> None:
    async def test() -> None:
        streams = [engine.generate(f"r{i}", [i], greedy(200)) for i in range(5)]
        await anext(streams[0])
        assert engine.stats().waiting > 0
        for i in range(6):
            engine.abort(f"r{i}")
        for stream in streams:
            assert (await read(stream))[-1].finish_reason is FinishReason.ABORT
        await until(lambda: idle(engine))

    run(test)


def test_a_slow_reader_gets_merged_outputs_and_loses_nothing(engine: AsyncEngine) -> None:
    async def test() -> None:
        before = engine.stats().finished
        stream = engine.generate("slow", [1], greedy(200))
        await until(lambda: engine.stats().finished == before + 1)
        await asyncio.sleep(0.01)
        outputs = await read(stream)
        assert len(outputs) <= 16
        whole = merge(outputs)
        assert list(whole.token_ids) == solo_tokens([1], 200)
        assert whole.text == bytes(whole.token_ids).decode()
        assert (whole.finished, whole.num_output) == (True, 200)

    run(test)


def test_a_failing_request_ends_with_its_error_alone(engine: AsyncEngine) -> None:
    async def test() -> None:
        bad, good = engine.generate("bad", [1], greedy()), engine.generate("good", [2], greedy())
        [output] = await read(bad)
        assert (output.finish_reason, output.error) == (FinishReason.ERROR, "RuntimeError: cannot compute")
        assert list(merge(await read(good)).token_ids) == solo_tokens([2], 6)
        assert engine.healthy is None

    run(test)


def test_when_the_engine_dies_everyone_learns_why() -> None:
    async def test() -> None:
        go = threading.Event()

        def die(step: Step) -> None:
            if go.is_set():
                raise MemoryError("no more")
            time.sleep(0.001)

        async with engine_over(FakeRunner(on_execute=die), max_num_seqs=1) as engine:
            streams = [engine.generate(f"r{i}", [i], greedy(200)) for i in range(3)]
            await anext(streams[0])
            go.set()
            for stream in streams:
                with pytest.raises(EngineDead, match="MemoryError: no more"):
                    await read(stream)
            assert engine.healthy is not None
            assert "MemoryError: no more" in engine.healthy
            with pytest.raises(EngineDead, match="MemoryError: no more"):
                engine.generate("late", [1], greedy())
            with pytest.raises(EngineDead, match="MemoryError: no more"):
                engine.start()
            assert await engine.drain(1.0)

    run(test)


def test_a_fault_of_the_loop_itself_is_told_too() -> None:
    async def test() -> None:
        core = fake_core()
        core.scheduler.schedule = None  # type: ignore[assignment,method-assign]
        async with started(AsyncEngine(ThreadTransport(core))) as engine:
            with pytest.raises(EngineDead, match="TypeError"):
                await read(engine.generate("a", [1], greedy()))

    run(test)


def test_drain_lets_requests_end_and_takes_no_more() -> None:
    async def test() -> None:
        async with engine_over(FakeRunner(step_delay_s=0.001)) as engine:
            stream = engine.generate("a", [1], greedy(30))
            await anext(stream)
            draining = asyncio.ensure_future(engine.drain(10.0))
            await asyncio.sleep(0)
            with pytest.raises(CapacityError, match="shutting down"):
                engine.generate("b", [1], greedy())
            assert await draining
            assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH

    run(test)


def test_drain_aborts_what_takes_too_long() -> None:
    async def test() -> None:
        async with engine_over(FakeRunner(step_delay_s=0.01)) as engine:
            stream = engine.generate("a", [1], greedy(200))
            await anext(stream)
            assert not await engine.drain(0.05)
            assert (await read(stream))[-1].finish_reason is FinishReason.ABORT
            await until(lambda: idle(engine))

    run(test)


def test_stop_ends_streams_and_the_thread() -> None:
    async def test() -> None:
        async with engine_over(FakeRunner(step_delay_s=0.001)) as engine:
            stream = engine.generate("a", [1], greedy(200))
            await anext(stream)
            engine.stop()
            engine.stop()
            with pytest.raises(EngineDead, match="the engine was stopped"):
                await read(stream)
            assert engine.healthy == "the engine was stopped"
            assert not [t for t in threading.enumerate() if t.name == "dibit-engine"]

    run(test)


def test_an_engine_that_was_not_started_says_so() -> None:
    async def test() -> None:
        engine = AsyncEngine(ThreadTransport(fake_core()))
        assert engine.healthy == "the engine has not been started"
        with pytest.raises(EngineDead, match="not been started"):
            engine.generate("a", [1], greedy())
        engine.stop()
        with pytest.raises(EngineDead, match="stopped"):
            engine.start()

    run(test)


def test_a_reader_whose_event_loop_is_gone_holds_nothing(engine: AsyncEngine) -> None:
    before = engine.stats().aborted
    kept: list[RequestStream] = []

    async def leave() -> None:
        kept.append(engine.generate("a", [1], greedy(200)))

    asyncio.run(leave())
    asyncio.run(until(lambda: idle(engine)))
    assert engine.stats().aborted - before == 1

    async def other_loop() -> None:
        assert list(merge(await read(engine.generate("a", [1], greedy(3)))).token_ids) == solo_tokens([1], 3)

    asyncio.run(other_loop())
