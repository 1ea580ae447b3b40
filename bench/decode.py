"""Prefill and decode speed of the engine, without HTTP, beside the memory bandwidth of the same run.

Every sequence gets its own random prompt of `prompt_len` tokens. Prefill is timed over the steps until the last
sequence has its first token; decode over the steps in which all sequences draw one token each, `gen_len` of them.
Tokenizing, sampling (greedy), scheduling and detokenizing are inside the time. The read bandwidth is measured before
every run, in the same process, on the same threads.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dibit.bench.bandwidth import read_bandwidth
from dibit.bench.machine import MachineFacts, machine_facts
from dibit.bench.step_profile import OpTime, format_profile, profile_step
from dibit.engine.build import build_core
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError
from dibit.engine.runner import ModelRunner
from dibit.engine.step import Step, StepCounts, StepResult
from dibit.kernels import native

BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True)
class DecodeResult:
    """Medians over `repeats` runs of one batch size.

    decode_step_ms_runs     the step's time in every run; decode_step_ms is their median
    weight_bytes_per_token  bytes of weights that one decode step reads, over the tokens it makes
    weight_gb_s             bytes of weights read per second of decoding, 1e9 bytes
    bandwidth_gb_s          read bandwidth of memory on the same threads, measured in the same run
    bandwidth_share         weight_gb_s / bandwidth_gb_s
    model_share             part of a decode step that is spent in the runner (the rest is scheduling and text)
    tape_share              part of a decode step that is spent in native code without Python (0 when not replayed)
    bits, group_size        of the blocks' linears; 16 or 32 bits and group 0 for float weights
    ops                     where the time of a step goes; empty unless asked for
    """

    model: str
    batch: int
    prompt_len: int
    gen_len: int
    prefill_tok_s: float
    decode_tok_s: float
    decode_step_ms: float
    decode_step_ms_runs: list[float]
    weight_bytes_per_token: float
    weight_gb_s: float
    bandwidth_gb_s: float
    bandwidth_share: float
    model_share: float
    tape_share: float
    threads: int
    isa: str
    bits: float
    group_size: int
    repeats: int
    ops: list[OpTime]
    machine: MachineFacts


class _Watch:
    """Stands before the runner: remembers the last step and the time spent computing it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.max_model_len, self.num_layers = runner.max_model_len, runner.num_layers
        self.last = Step(())
        self.elapsed_s = self.tape_s = 0.0

    @property
    def step_counts(self) -> StepCounts:
        return self.runner.step_counts

    def execute(self, step: Step) -> StepResult:
        started_s, tape_s = time.perf_counter(), self.runner.tape_s
        result = self.runner.execute(step)
        self.elapsed_s, self.tape_s = time.perf_counter() - started_s, self.runner.tape_s - tape_s
        self.last = step
        return result


def run_decode(
    models: Sequence[str],
    config: EngineConfig,
    *,
    prompt_len: int = 512,
    gen_len: int = 128,
    batch_sizes: Sequence[int] = (1, 8, 32),
    repeats: int = 3,
    profile: bool = False,
) -> list[DecodeResult]:
    """One result per model and batch size, by model. Several models are held together and take turns within every
    repeat, so that their ratios hold where the machine's speed drifts.

    Raises ConfigError when a batch does not fit the engine's settings.
    """
    largest = max(batch_sizes)
    if min(prompt_len, gen_len, repeats, *batch_sizes) < 1:
        raise ConfigError("prompt-len, gen-len, repeats and batch sizes must be at least 1")
    if largest > config.max_num_seqs:
        raise ConfigError(f"batch {largest} with --max-num-seqs {config.max_num_seqs}; raise --max-num-seqs")
    if (reason := native.unavailable()) is not None:
        raise ConfigError(f"bench decode measures the C++ kernels and the bandwidth they read with; {reason}")
    # Prompts are read at full speed; whoever decodes meanwhile is not waited for.
    config = dataclasses.replace(config, kv_memory_share=config.kv_memory_share / len(models), max_itl_ratio=0)
    benches = [_Bench.of(model, config) for model in models]
    for bench in benches:
        bench.check(largest, prompt_len=prompt_len, gen_len=gen_len)
        bench.run(1, prompt_len=min(prompt_len, 64), gen_len=min(gen_len, 8), seed=0)
    facts = machine_facts()
    measured: dict[tuple[int, int], list[_Run]] = {}
    ops: dict[tuple[int, int], list[OpTime]] = {}
    for batch in batch_sizes:
        for repeat in range(repeats):
            for index, bench in enumerate(benches):
                run = bench.run(batch, prompt_len=prompt_len, gen_len=gen_len, seed=repeat)
                measured.setdefault((index, batch), []).append(run)
        if profile:
            for index, bench in enumerate(benches):
                ops[index, batch] = bench.profile(batch, prompt_len=prompt_len, gen_len=gen_len)
    return [
        _result(
            bench,
            batch,
            measured[index, batch],
            ops.get((index, batch), []),
            facts,
            prompt_len=prompt_len,
            gen_len=gen_len,
        )
        for index, bench in enumerate(benches)
        for batch in batch_sizes
    ]


def format_table(results: Sequence[DecodeResult]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| model | bits | batch | prefill tok/s | decode tok/s | step ms | in tape | MB/token | GB/s | of bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.model} | {r.bits:g} | {r.batch} | {r.prefill_tok_s:.0f} | {r.decode_tok_s:.1f} | "
        f"{r.decode_step_ms:.2f} | {r.tape_share:.1%} | {r.weight_bytes_per_token / 1e6:.1f} | {r.weight_gb_s:.1f} | "
        f"{r.bandwidth_share:.0%} of {r.bandwidth_gb_s:.1f} |"
        for r in results
    ]
    first = results[0]
    profiles = [part for r in results if r.ops for part in ("", format_profile(r.ops))]
    return "\n".join([f"{first.threads} threads, {first.isa}", "", *lines, *profiles])


def _result(
    bench: _Bench,
    batch: int,
    runs: Sequence[_Run],
    ops: list[OpTime],
    facts: MachineFacts,
    *,
    prompt_len: int,
    gen_len: int,
) -> DecodeResult:
    decoder = bench.watch.runner.decoder
    step_s = statistics.median(run.decode_s for run in runs) / gen_len
    weight_gb_s = decoder.step_bytes / step_s / 1e9
    bandwidth_gb_s = statistics.median(run.bandwidth_gb_s for run in runs)
    return DecodeResult(
        model=bench.model,
        batch=batch,
        prompt_len=prompt_len,
        gen_len=gen_len,
        prefill_tok_s=batch * prompt_len / statistics.median(run.prefill_s for run in runs),
        decode_tok_s=batch / step_s,
        decode_step_ms=step_s * 1e3,
        decode_step_ms_runs=[run.decode_s / gen_len * 1e3 for run in runs],
        weight_bytes_per_token=decoder.step_bytes / batch,
        weight_gb_s=weight_gb_s,
        bandwidth_gb_s=bandwidth_gb_s,
        bandwidth_share=weight_gb_s / bandwidth_gb_s,
        model_share=statistics.median(run.model_s / run.decode_s for run in runs),
        tape_share=statistics.median(run.tape_s / run.decode_s for run in runs),
        threads=facts.threads,
        isa=facts.isa,
        bits=32 if decoder.format is None else decoder.format.bits,
        group_size=0 if decoder.format is None else decoder.format.group_size,
        repeats=len(runs),
        ops=ops,
        machine=facts,
    )


@dataclass(frozen=True)
class _Run:
    """Seconds of prefill, of all decode steps, and of the runner and of its tapes within those steps."""

    prefill_s: float
    decode_s: float
    model_s: float
    tape_s: float
    bandwidth_gb_s: float


@dataclass(frozen=True)
class _Bench:
    """A model, ready to run."""

    model: str
    core: EngineCore
    watch: _Watch

    @classmethod
    def of(cls, model: str, config: EngineConfig) -> _Bench:
        core = build_core(model, config)
        assert isinstance(core.runner, ModelRunner)
        watch = _Watch(core.runner)
        core.runner = watch
        return cls(model, core, watch)

    def check(self, batch: int, *, prompt_len: int, gen_len: int) -> None:
        """Raises ConfigError when `batch` sequences of that length do not fit."""
        core, watch = self.core, self.watch
        longest = self.longest(batch, prompt_len, gen_len)
        held = batch * -(-longest // watch.block_size)
        if held > watch.num_blocks or longest > core.max_model_len:
            raise ConfigError(
                f"batch {batch} with {prompt_len} + {gen_len} tokens needs {held} KV blocks of {watch.block_size} "
                f"tokens and a context of {longest}; {self.model} has {watch.num_blocks} blocks and "
                f"{core.max_model_len} tokens of context. Raise --kv-bytes, or lower the lengths or the batch"
            )

    def longest(self, batch: int, prompt_len: int, gen_len: int) -> int:
        """Tokens that a sequence may reach: the first one decodes while the others are still prefilled."""
        steps = -(-batch * prompt_len // max(1, self.core.config.max_batch_tokens - batch)) + batch
        return prompt_len + gen_len + steps + 2

    def profile(self, batch: int, *, prompt_len: int, gen_len: int) -> list[OpTime]:
        """Times of the ops in the last decode step of another run."""
        run = self.run(batch, prompt_len=prompt_len, gen_len=gen_len, seed=-1)
        return profile_step(
            self.watch.runner,
            model=self.model,
            batch=batch,
            lengths=[chunk.start + 1 for chunk in self.watch.last.chunks],
            bandwidth_gb_s=run.bandwidth_gb_s,
        )

    def run(self, batch: int, *, prompt_len: int, gen_len: int, seed: int) -> _Run:
        """The bandwidth, then a prefill of `batch` prompts and `gen_len` decode steps."""
        core, watch = self.core, self.watch
        bandwidth_gb_s = read_bandwidth(native.threads(), BANDWIDTH_BYTES, passes=1)
        draw = random.Random(seed)
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=self.longest(batch, prompt_len, gen_len) - prompt_len
        )
        names = [f"bench-{batch}-{seed}-{i}" for i in range(batch)]
        for name in names:
            # A prompt of its own for each: a shared one would come from the prefix cache.
            core.add_request(name, [draw.randrange(core.tokenizer.vocab_size) for _ in range(prompt_len)], params)
        started_s = time.perf_counter()
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in core.step() if output.token_ids}
        prefill_s = time.perf_counter() - started_s
        decode_s = model_s = tape_s = 0.0
        for _ in range(gen_len):
            started_s = time.perf_counter()
            core.step()
            decode_s += time.perf_counter() - started_s
            model_s += watch.elapsed_s
            tape_s += watch.tape_s
            if watch.last.num_tokens != batch:
                raise RuntimeError(f"a decode step computed {watch.last.num_tokens} tokens for {batch} sequences")
        for name in names:
            core.abort(name)
        while core.has_work:
            core.step()
        return _Run(prefill_s, decode_s, model_s, tape_s, bandwidth_gb_s)
