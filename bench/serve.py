"""A serving benchmark: streamed requests to any OpenAI endpoint, at a rate or at a concurrency.

With a rate, requests are sent at the times of a Poisson process whatever has been answered (an open loop; other
burstiness: gamma-distributed gaps); they are stretched so that the last one falls on requests / rate. With a highest
concurrency, a request waits until fewer are under way (a closed loop) and its time starts when it is sent. Every run
of a series draws prompts of its own: the same ones again would come from the prefix cache.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dibit.bench.machine import commit_id
from dibit.bench.serve_client import RequestResult, Target, open_client, send
from dibit.bench.serve_metrics import ServeMetrics, measure
from dibit.bench.serve_prompts import Dataset, Prompt, draw_prompts
from dibit.engine.doctor import cpu_name
from dibit.engine.errors import ConfigError
from dibit.engine.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
_MOST_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class Load:
    """How requests are sent in one run.

    request_rate     requests per second; inf: all at once
    burstiness       shape of the gaps: 1 is Poisson, less comes in bursts, more is even
    max_concurrency  requests under way at once; None: no limit
    num_warmups      requests before the run, one after the other, with texts of their own
    """

    num_prompts: int = 1000
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.num_warmups < 0:
            raise ConfigError("at least one prompt and no negative number of warm-ups")
        if not (self.request_rate > 0 and self.burstiness > 0):
            raise ConfigError("request rate and burstiness must be above 0 (rate inf: all at once)")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"max concurrency {self.max_concurrency}; it must be at least 1")


@dataclass(frozen=True)
class Measure:
    """What is reported of a run; see serve_metrics."""

    metrics: Sequence[str] = ("ttft", "tpot", "itl", "e2el")
    percentiles: Sequence[float] = (50, 99)
    goodput_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ServeRun:
    """One run and its figures."""

    load: Load
    target: Target
    tokenizer_id: str
    date: datetime
    metrics: ServeMetrics
    results: tuple[RequestResult, ...]

    def text(self) -> str:
        block = self.metrics.text(request_rate=self.load.request_rate, max_concurrency=self.load.max_concurrency)
        errors = sorted({result.error for result in self.results if result.error})
        return "\n".join([block, *(f"failed: {error}" for error in errors[:_MOST_ERRORS_SHOWN])])

    def to_json(
        self, *, label: str | None, metadata: Mapping[str, str], command: str, detailed: bool
    ) -> dict[str, Any]:
        """The keys of vLLM's result files; `client` is where the requests came from."""
        rate = self.load.request_rate
        values: dict[str, Any] = {
            "date": self.date.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": self.target.backend,
            "backend": self.target.backend,
            "label": label,
            "model_id": self.target.model,
            "tokenizer_id": self.tokenizer_id,
            "num_prompts": self.load.num_prompts,
            **metadata,
            "request_rate": rate if math.isfinite(rate) else "inf",
            "burstiness": self.load.burstiness,
            "max_concurrency": self.load.max_concurrency,
            **self.metrics.to_json(),
            "client": {"cpu": cpu_name(), "commit": commit_id(), "command": command},
        }
        if detailed:
            first_s = min(result.start_s for result in self.results)
            values |= {
                "input_lens": [r.input_tokens for r in self.results],
                "output_lens": [r.output_tokens for r in self.results],
                "ttfts": [r.ttft_s for r in self.results],
                "itls": [list(r.gaps_s) for r in self.results],
                "start_times": [r.start_s - first_s for r in self.results],
                "generated_texts": [r.text for r in self.results],
                "errors": [r.error for r in self.results],
            }
        return values

    def file_name(self, *, label: str | None) -> str:
        limit = self.load.max_concurrency
        parts = [label or self.target.backend, f"{self.load.request_rate:g}qps"]
        parts += [f"concurrency{limit}"] if limit is not None else []
        parts += [self.target.model.rpartition("/")[2], self.date.strftime("%Y%m%d-%H%M%S")]
        return "-".join(parts) + ".json"


def run_serve(
    target: Target,
    dataset: Dataset,
    load: Load,
    measured: Measure,
    *,
    tokenizer: Tokenizer | None,
    tokenizer_id: str = "",
    rates: Sequence[float] = (),
    concurrencies: Sequence[int | None] = (),
    progress: Progress | None = None,
) -> Iterator[ServeRun]:
    """A run for every rate with every concurrency (left out: the load's own), each given out when it is done.

    Raises ConfigError when the endpoint cannot be used or no request of a run succeeds.
    """
    for index, (rate, limit) in enumerate(
        itertools.product(rates or (load.request_rate,), concurrencies or (load.max_concurrency,))
    ):
        one = replace(load, request_rate=rate, max_concurrency=limit, seed=load.seed + index)
        prompts = draw_prompts(dataset, one.num_prompts, tokenizer, seed=one.seed)
        date = datetime.now(UTC)
        results, duration_s = asyncio.run(_run(target, prompts, one, progress or _silent))
        if all(result.error for result in results):
            raise ConfigError(f"every request to {target.url} failed; the first one: {results[0].error}")
        metrics = measure(
            results,
            duration_s=duration_s,
            metrics=measured.metrics,
            percentiles=measured.percentiles,
            goodput_ms=measured.goodput_ms,
        )
        yield ServeRun(one, target, tokenizer_id, date, metrics, tuple(results))


def arrival_times(count: int, rate: float, burstiness: float, *, seed: int) -> list[float]:
    """Seconds after the start at which `count` requests are sent."""
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(f"arrivals/{seed}")
    gaps = [draw.gammavariate(burstiness, 1.0) for _ in range(count)]
    stretch = count / rate / sum(gaps)
    return [time_s * stretch for time_s in itertools.accumulate(gaps)]


def write_result(run: ServeRun, path: Path, **settings: Any) -> None:
    """The run as JSON, whole or not at all; settings of `ServeRun.to_json`."""
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(run.to_json(**settings), indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _silent(done: int, total: int) -> None:
    pass


async def _run(
    target: Target, prompts: Sequence[Prompt], load: Load, progress: Progress
) -> tuple[list[RequestResult], float]:
    """Results in the order of the prompts, and the seconds that the run took."""
    async with open_client() as client:
        for i in range(load.num_warmups):
            warm_up = prompts[i % len(prompts)]
            # Another beginning, so that the run finds nothing of it in a prefix cache.
            text = f"Warm-up {i}. {warm_up.text[: len(warm_up.text) // 2]}"
            result = await send(client, target, replace(warm_up, text=text))
            if result.error:
                raise ConfigError(f"the first request to {target.url} failed: {result.error}")
        gate = asyncio.Semaphore(load.max_concurrency or len(prompts))
        done = 0

        async def one(prompt: Prompt) -> RequestResult:
            nonlocal done
            async with gate:
                result = await send(client, target, prompt)
            done += 1
            progress(done, len(prompts))
            return result

        tasks = []
        start_s = time.perf_counter()
        times_s = arrival_times(len(prompts), load.request_rate, load.burstiness, seed=load.seed)
        for prompt, time_s in zip(prompts, times_s, strict=True):
            # Never a wait of zero: with all at once, the first must not be served before the last is sent.
            if (wait_s := start_s + time_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(one(prompt)))
        results = await asyncio.gather(*tasks)
        return list(results), time.perf_counter() - start_s
