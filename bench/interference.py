"""How a long prompt that arrives disturbs those who are being answered: their inter-token latency, quiet and beside it.

    python -m dibit.bench.interference MODEL --prompt-len 4096 --json bench/results/interference.json

Some streams decode; after a quiet while a long prompt arrives, and until its first token the gaps between the tokens
of every stream are taken, in the engine, without HTTP. Meanwhile the streams get longer by as many tokens, and their
steps with them, whether or not a prompt is beside; so a quiet while after it is taken too, and what is beside the
prompt is compared with the mean of both. Repeats have fresh prompts. The first one is reported by itself
too: the engine learns while it serves what prompts take (step_cost.py), and has learned nothing of long ones yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dibit.bench.machine import MachineFacts, machine_facts
from dibit.engine.build import build_core
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError, DibitError
from dibit.server.output import emit

STREAM_PROMPT_LEN = 32


@dataclass(frozen=True)
class Gaps:
    """Milliseconds between tokens of streams."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, gaps_s: Sequence[float]) -> Gaps:
        """The p99 is the smallest gap that 99 % of them do not exceed."""
        ordered = sorted(1e3 * gap for gap in gaps_s)
        return cls(len(ordered), statistics.median(ordered), ordered[-(-99 * len(ordered) // 100) - 1], ordered[-1])


@dataclass(frozen=True)
class Arrival:
    """One prompt that arrived; `ttft_s` is its time to the first token."""

    quiet: Gaps
    beside: Gaps
    quiet_after: Gaps
    ttft_s: float

    @property
    def quiet_ms(self) -> float:
        """The quiet median at the streams' length beside the prompt: the mean of before and after."""
        return (self.quiet.p50_ms + self.quiet_after.p50_ms) / 2

    @property
    def ratio(self) -> float:
        """The 99th percentile beside the prompt, over the quiet median."""
        return self.beside.p99_ms / self.quiet_ms


@dataclass(frozen=True)
class InterferenceResult:
    """ratio  the median over the arrivals but the first, where there are several"""

    model: str
    streams: int
    prompt_len: int
    quiet_steps: int
    max_itl_ratio: float
    max_batch_tokens: int
    ratio: float
    first_ratio: float
    arrivals: tuple[Arrival, ...]
    machine: MachineFacts

    def text(self) -> str:
        lines = [
            f"{self.machine.line()}; {self.model}\n",
            "| arrival | quiet before: ITL p50 ms | p99 | beside: p50 | p99 | max | quiet after: p50 | p99 | "
            "p99 beside / quiet p50 | prompt's TTFT s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {number} | {a.quiet.p50_ms:.2f} | {a.quiet.p99_ms:.2f} | "
            f"{a.beside.p50_ms:.2f} | {a.beside.p99_ms:.2f} | {a.beside.max_ms:.2f} | "
            f"{a.quiet_after.p50_ms:.2f} | {a.quiet_after.p99_ms:.2f} | {a.ratio:.2f} | {a.ttft_s:.2f} |"
            for number, a in enumerate(self.arrivals, start=1)
        ]
        lines.append(f"\np99 beside a prompt of {self.prompt_len} tokens: {self.ratio:.2f} times the quiet median")
        return "\n".join(lines)


def measure(
    core: EngineCore,
    *,
    streams: int,
    prompt_len: int,
    quiet_steps: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Arrival]:
    """Raises ConfigError when the engine has no room for it."""
    if min(streams, prompt_len, quiet_steps, repeats) < 1:
        raise ConfigError("streams, prompt-len, quiet-steps and repeats must be at least 1")
    # Enough while two tokens of a prompt go into a step.
    length = 2 * quiet_steps + prompt_len // 2 + 32
    size = core.pool.block_size
    blocks = -(-(prompt_len + 1) // size) + streams * -(-(STREAM_PROMPT_LEN + length) // size)
    blocks += -(-blocks // 16)  # a request enters only beside some free ones
    longest = max(prompt_len + 1, STREAM_PROMPT_LEN + length)
    if core.max_model_len < longest or core.pool.num_blocks < blocks or core.config.max_num_seqs <= streams:
        raise ConfigError(
            f"{streams} streams and a prompt of {prompt_len} tokens need a context of {longest}, {blocks} KV blocks "
            f"and {streams + 1} sequences; the engine has {core.max_model_len}, {core.pool.num_blocks} and "
            f"{core.config.max_num_seqs}"
        )
    return [_arrival(core, streams, prompt_len, quiet_steps, length, seed=seed, clock=clock) for seed in range(repeats)]


def _arrival(
    core: EngineCore,
    streams: int,
    prompt_len: int,
    quiet_steps: int,
    length: int,
    *,
    seed: int,
    clock: Callable[[], float],
) -> Arrival:
    draw = random.Random(seed)

    def prompt(tokens: int) -> list[int]:
        return [draw.randrange(core.tokenizer.vocab_size) for _ in range(tokens)]

    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length)
    names = [f"stream-{i}" for i in range(streams)]
    for name in names:
        core.add_request(name, prompt(STREAM_PROMPT_LEN), greedy)
    last_s: dict[str, float] = {}
    gaps: list[float] = []

    def step() -> set[str]:
        """Who got a token; gaps of streams are taken."""
        outputs = core.step()
        now_s = clock()
        heard = set()
        for output in outputs:
            if output.error is not None or (output.finished and output.request_id in names):
                raise ConfigError(f"{output.request_id} ended early: {output.error or output.finish_reason}")
            if output.token_ids:
                heard.add(output.request_id)
        for name in heard & set(names):
            if name in last_s:
                gaps.append(now_s - last_s[name])
            last_s[name] = now_s
        return heard

    def quiet_while() -> Gaps:
        gaps.clear()
        for _ in range(quiet_steps):
            step()
        return Gaps.of(gaps)

    waiting = set(names)
    while waiting:
        waiting -= step()
    quiet = quiet_while()
    gaps.clear()
    arrived_s = clock()
    core.add_request("long", prompt(prompt_len), dataclasses.replace(greedy, max_tokens=1))
    while "long" not in step():
        pass
    ttft_s = clock() - arrived_s
    beside = Gaps.of(gaps)
    quiet_after = quiet_while()
    for name in names:
        core.abort(name)
    while core.has_work:
        core.step()
    return Arrival(quiet, beside, quiet_after, ttft_s)


def main() -> None:
    parser = argparse.ArgumentParser(description="Inter-token latency while a long prompt arrives.")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--quiet-steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-itl-ratio", type=float, default=EngineConfig.max_itl_ratio)
    parser.add_argument("--max-batch-tokens", type=int, default=EngineConfig.max_batch_tokens)
    parser.add_argument("--json", type=Path, help="write all arrivals to this file")
    asked = parser.parse_args()
    try:
        config = EngineConfig(
            threads=asked.threads,
            max_num_seqs=asked.streams + 1,
            max_itl_ratio=asked.max_itl_ratio,
            max_batch_tokens=asked.max_batch_tokens,
        )
        arrivals = measure(
            build_core(asked.model, config),
            streams=asked.streams,
            prompt_len=asked.prompt_len,
            quiet_steps=asked.quiet_steps,
            repeats=asked.repeats,
        )
    except DibitError as error:
        sys.exit(f"interference: {error}")
    result = InterferenceResult(
        model=asked.model,
        streams=asked.streams,
        prompt_len=asked.prompt_len,
        quiet_steps=asked.quiet_steps,
        max_itl_ratio=config.max_itl_ratio,
        max_batch_tokens=config.max_batch_tokens,
        ratio=statistics.median(arrival.ratio for arrival in arrivals[1:] or arrivals),
        first_ratio=arrivals[0].ratio,
        arrivals=tuple(arrivals),
        machine=machine_facts(),
    )
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
    emit(result, None if asked.json is None else str(asked.json))


if __name__ == "__main__":
    main()
