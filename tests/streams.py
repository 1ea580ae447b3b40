"""What tests of AsyncEngine share: parameters, readers, waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from dibit.engine.async_engine import AsyncEngine, RequestStream
from dibit.engine.config import SamplingParams
from dibit.engine.outputs import RequestOutput


def greedy(max_tokens: int = 6) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        await asyncio.sleep(0.001)


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == 0 and stats.free_blocks == stats.num_blocks


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(limited())
