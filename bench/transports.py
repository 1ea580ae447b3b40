"""What it costs to have the engine on a thread of the server or in a process of its own: seconds of processor time for
each token that passes, apart from the model.

    python -m dibit.bench.transports --json transports.json

The model takes no time: a step gives every sequence the same token. Streams are read in the process that asks, without
HTTP; processor time is that of both processes. The transports take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import psutil

from dibit.bench.machine import MachineFacts, machine_facts
from dibit.engine.async_engine import AsyncEngine
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.detokenizer import IncrementalDetokenizer
from dibit.engine.errors import ConfigError, DibitError
from dibit.engine.process_transport import ProcessTransport
from dibit.engine.step import Sampled, Step, StepCounts, StepResult
from dibit.engine.tokenizer import Tokenizer
from dibit.engine.transport import ThreadTransport
from dibit.server.options import parse_integers
from dibit.server.output import emit

MAX_MODEL_LEN = 2048


class OneLetter:
    """As much of a tokenizer as the engine uses: token 1 is the letter a."""

    eos_ids = frozenset({0})
    vocab_size = 2

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return b"a" if token_id == 1 else None

    def stream(
        self, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), include_stop: bool = False
    ) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self, prompt_ids, stop, include_stop=include_stop)


class NoModel:
    """A `Runner` that computes nothing."""

    block_size = 32
    max_model_len = MAX_MODEL_LEN
    num_layers = 1
    step_counts = StepCounts()

    def __init__(self, config: EngineConfig) -> None:
        self.num_blocks = config.max_num_seqs * MAX_MODEL_LEN // self.block_size

    def execute(self, step: Step) -> StepResult:
        return StepResult({chunk.request.id: Sampled(1) for chunk in step.chunks if chunk.samples})


def build(model: str, config: EngineConfig) -> EngineCore:
    """Called in the engine's process; `model` has no meaning."""
    return EngineCore(NoModel(config), _tokenizer(), config)


def _tokenizer() -> Tokenizer:
    return cast("Tokenizer", OneLetter())


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats, in microseconds a token: processor time of all processes, and time that passed."""

    transport: str
    streams: int
    cpu_us: float
    wall_us: float


@dataclass(frozen=True)
class Report:
    tokens: int
    repeats: int
    costs: list[Cost]
    machine: MachineFacts

    def text(self) -> str:
        rows = ["transport  streams  processor us/token  time us/token"]
        rows += [f"{c.transport:9}  {c.streams:7}  {c.cpu_us:18.1f}  {c.wall_us:13.1f}" for c in self.costs]
        return "\n".join(rows)


def measure(streams: Sequence[int], *, tokens: int, repeats: int) -> list[Cost]:
    """Of `tokens` tokens to each of so many streams. Raises ConfigError for less than one of anything."""
    if min(*streams, tokens, repeats) < 1 or tokens >= MAX_MODEL_LEN:
        raise ConfigError(f"streams and repeats must be at least 1, and tokens lie in [1, {MAX_MODEL_LEN - 1}]")
    config = EngineConfig(max_num_seqs=max(streams), max_batch_tokens=max(256, *streams))
    thread = ThreadTransport(build("", config))
    process = ProcessTransport.launch("", config, load_tokenizer=_tokenizer, factory="dibit.bench.transports:build")
    engines = {"thread": AsyncEngine(thread), "process": AsyncEngine(process)}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    child = psutil.Process(process.pid)

    def now() -> tuple[float, float]:
        return time.process_time() + sum(child.cpu_times()[:2]), time.perf_counter()

    try:
        for engine in engines.values():
            engine.start()
        # The first round warms up.
        for repeat in range(repeats + 1):
            for count in streams:
                for name, engine in engines.items():
                    before = now()
                    asyncio.run(_read(engine, count, tokens))
                    spent = [1e6 * (b - a) / (count * tokens) for a, b in zip(before, now(), strict=True)]
                    if repeat:
                        times.setdefault((name, count), []).append((spent[0], spent[1]))
    finally:
        for engine in engines.values():
            engine.stop()
    return [
        Cost(name, count, *(statistics.median(column) for column in zip(*found, strict=True)))
        for (name, count), found in times.items()
    ]


async def _read(engine: AsyncEngine, count: int, tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=tokens)

    async def one(i: int) -> None:
        async for _ in engine.generate(str(i), [1], params):
            pass

    await asyncio.gather(*map(one, range(count)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dibit.bench.transports", description=__doc__)
    parser.add_argument("--streams", default="1,8,32", help="sequences at once; several (1,8) make a row each")
    parser.add_argument("--tokens", type=int, default=1000, help="of each sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE|-", help="write the figures as JSON to FILE, or - for stdout")
    chosen = parser.parse_args(arguments)
    try:
        costs = measure(parse_integers(chosen.streams), tokens=chosen.tokens, repeats=chosen.repeats)
        emit(Report(chosen.tokens, chosen.repeats, costs, machine_facts()), chosen.json)
    except DibitError as error:
        print(f"transports: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
