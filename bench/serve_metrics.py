"""Figures of a serving benchmark: names, definitions and text layout as vLLM's `bench serve` has them.

TTFT   time to first token: from sending to the first chunk of output
TPOT   time per output token after the first: (latency - TTFT) / (tokens - 1), a value per request
ITL    inter-token latency: the gaps between chunks of output, all requests together
E2EL   end-to-end latency: from sending to the last chunk

Goodput counts the requests per second that met every given bound. Failed requests count nowhere but as failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dibit.bench.serve_client import RequestResult
from dibit.engine.errors import ConfigError

HEADERS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
_WIDTH, _LABEL = 50, 41


@dataclass(frozen=True)
class Spread:
    """How one metric spread, in milliseconds; `percentiles` are (percent, value)."""

    mean: float
    median: float
    std: float
    percentiles: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ServeMetrics:
    """Figures of one run.

    duration_s                 from the first request to the last answer
    max_output_tokens_per_s    in the best whole second of the run
    max_concurrent_requests    most requests under way at once
    """

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    spreads: Mapping[str, Spread]

    def to_json(self) -> dict[str, Any]:
        """The keys of vLLM's result files."""
        values: dict[str, Any] = {
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "max_output_tokens_per_s": self.max_output_tokens_per_s,
            "max_concurrent_requests": self.max_concurrent_requests,
        }
        for name, spread in self.spreads.items():
            values |= {f"mean_{name}_ms": spread.mean, f"median_{name}_ms": spread.median, f"std_{name}_ms": spread.std}
            values |= {f"p{percent:g}_{name}_ms": value for percent, value in spread.percentiles}
        return values

    def text(self, *, request_rate: float, max_concurrency: int | None) -> str:
        """The block that is printed after a run."""
        lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]

        def line(label: str, value: float, *, digits: int = 2) -> None:
            lines.append(f"{label:<{_LABEL - 1}} {value:<.{digits}f}")

        line("Successful requests:", self.completed, digits=0)
        line("Failed requests:", self.failed, digits=0)
        if max_concurrency is not None:
            line("Maximum request concurrency:", max_concurrency, digits=0)
        if request_rate != float("inf"):
            line("Request rate configured (RPS):", request_rate)
        line("Benchmark duration (s):", self.duration_s)
        line("Total input tokens:", self.total_input_tokens, digits=0)
        line("Total generated tokens:", self.total_output_tokens, digits=0)
        line("Request throughput (req/s):", self.request_throughput)
        if self.request_goodput is not None:
            line("Request goodput (req/s):", self.request_goodput)
        line("Output token throughput (tok/s):", self.output_throughput)
        line("Peak output token throughput (tok/s):", self.max_output_tokens_per_s)
        line("Peak concurrent requests:", self.max_concurrent_requests)
        line("Total token throughput (tok/s):", self.total_token_throughput)
        for name, spread in self.spreads.items():
            lines.append(HEADERS[name].center(_WIDTH, "-"))
            line(f"Mean {name.upper()} (ms):", spread.mean)
            line(f"Median {name.upper()} (ms):", spread.median)
            line(f"Std {name.upper()} (ms):", spread.std)
            for percent, value in spread.percentiles:
                line(f"P{percent:g} {name.upper()} (ms):", value)
        lines.append("=" * _WIDTH)
        return "\n".join(lines)


def measure(
    results: Sequence[RequestResult],
    *,
    duration_s: float,
    metrics: Sequence[str] = ("ttft", "tpot", "itl", "e2el"),
    percentiles: Sequence[float] = (50, 99),
    goodput_ms: Mapping[str, float] | None = None,
) -> ServeMetrics:
    """Figures of the requests of one run. `goodput_ms` bounds ttft, tpot or e2el."""
    done = [result for result in results if not result.error]
    output_tokens = sum(result.output_tokens for result in done)
    input_tokens = sum(result.input_tokens for result in done)
    values = {
        "ttft": [r.ttft_s for r in done],
        "tpot": [r.tpot_s for r in done if r.output_tokens > 1],
        "itl": [gap for r in done for gap in r.gaps_s],
        "e2el": [r.latency_s for r in done],
    }
    good = sum(_is_good(result, goodput_ms) for result in done) if goodput_ms else None
    return ServeMetrics(
        completed=len(done),
        failed=len(results) - len(done),
        duration_s=duration_s,
        total_input_tokens=input_tokens,
        total_output_tokens=output_tokens,
        request_throughput=len(done) / duration_s,
        request_goodput=None if good is None else good / duration_s,
        output_throughput=output_tokens / duration_s,
        total_token_throughput=(input_tokens + output_tokens) / duration_s,
        max_output_tokens_per_s=_best_second(done),
        max_concurrent_requests=_most_at_once(done),
        spreads={name: _spread(values[name], percentiles) for name in metrics},
    )


def parse_goodput(text: str) -> dict[str, float]:
    """Bounds such as "ttft:500 tpot:80" in milliseconds. Raises ConfigError."""
    bounds = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition(":")
        try:
            bounds[name] = float(value)
        except ValueError:
            bounds[name] = -1.0
        if name not in GOODPUT_METRICS or bounds[name] < 0:
            known = ", ".join(GOODPUT_METRICS)
            raise ConfigError(f"{part!r} is no bound; write NAME:MILLISECONDS with a name of {known}: ttft:500 tpot:80")
    return bounds


def parse_metrics(text: str) -> list[str]:
    """A list such as "ttft,tpot". Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in HEADERS]:
        raise ConfigError(f"metric {unknown[0]!r}; there are: {', '.join(HEADERS)}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """A list such as "50,99.9". Raises ConfigError."""
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = [-1.0]
    if not all(0 <= percent <= 100 for percent in percents):
        raise ConfigError(f"{text!r} is no list of percentiles; write for example 50,90,99")
    return percents


def _is_good(result: RequestResult, bounds_ms: Mapping[str, float]) -> bool:
    found_s = {"ttft": result.ttft_s, "tpot": result.tpot_s, "e2el": result.latency_s}
    return all(found_s[name] * 1e3 <= bound for name, bound in bounds_ms.items())


def _spread(seconds: Sequence[float], percentiles: Sequence[float]) -> Spread:
    """Of nothing, zeros: a run of one-token answers has no gaps."""
    if not seconds:
        return Spread(0.0, 0.0, 0.0, tuple((percent, 0.0) for percent in percentiles))
    ms = np.asarray(seconds) * 1e3
    at = tuple((percent, float(np.percentile(ms, percent))) for percent in percentiles)
    return Spread(float(ms.mean()), float(np.median(ms)), float(ms.std()), at)


def _best_second(done: Sequence[RequestResult]) -> float:
    """Tokens of the busiest second; a chunk of several tokens counts as its share of the request's."""
    if not done:
        return 0.0
    first_s = min(result.start_s for result in done)
    seconds: dict[int, float] = {}
    for result in done:
        each = result.output_tokens / (len(result.gaps_s) + 1)
        now_s = result.start_s + result.ttft_s - first_s
        for gap_s in (0.0, *result.gaps_s):
            now_s += gap_s
            seconds[int(now_s)] = seconds.get(int(now_s), 0.0) + each
    return max(seconds.values())


def _most_at_once(done: Sequence[RequestResult]) -> int:
    # An end at the same moment as a start comes first.
    changes = sorted([(r.start_s, 1) for r in done] + [(r.start_s + r.latency_s, -1) for r in done])
    most = running = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
