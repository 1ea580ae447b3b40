"""What the routes share: the engine, the name it is served under, and the settings of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from dibit.engine.async_engine import AsyncEngine
from dibit.server.errors import ApiError

T = TypeVar("T")


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="dibit-tokenizer")


@dataclass(frozen=True)
class Service:
    """created         Unix time at which the model began to be served
    keep_alive_s    longest silence on a stream before a comment is sent
    max_body_bytes  largest request body
    max_choices     most answers of one request: prompts times n
    """

    engine: AsyncEngine
    model_name: str
    created: int
    keep_alive_s: float
    max_body_bytes: int
    max_choices: int
    # One thread: text is turned into tokens beside the event loop, without taking more than a core from the model.
    tokenizing: ThreadPoolExecutor = field(default_factory=_one_thread)

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def check_choices(self, count: int, *, param: str) -> None:
        if count > self.max_choices:
            raise ApiError(
                400,
                f"{count} answers were asked for; at most {self.max_choices} are given to one request, send several",
                param=param,
            )

    async def tokenize(self, make: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, make)
