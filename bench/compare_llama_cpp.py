"""dibit beside llama.cpp on one machine, in one run: `python -m dibit.bench.compare_llama_cpp --llama-cpp-bin DIR`.

Both sides take turns, case by case and repeat by repeat, in processes of their own, on the same threads; ratios are
those of neighbouring turns, and their medians are reported, so that they hold where the machine's speed drifts. Work
is the same on both sides: prompts of random tokens, one for each sequence; prefill timed until all are read, then
decode of a fixed number of tokens of each, greedy or any. Start is a whole process that answers with one token, model
files in the page cache; peak memory is that of a process which reads the prompt and decodes, mapped files included.

llama.cpp keeps the head and embedding at more bits than its type says (Q6_K or Q8_0); the table tells how many bytes
each side reads for a token. `--pure` has it keep everything in the type.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dibit.bench.comparison import CASES, Case, Row, Turn, format_rows, rows_of
from dibit.bench.llama_cpp import LlamaCpp, Ran, build, run, tensor_bytes
from dibit.bench.machine import MachineFacts, machine_facts
from dibit.bench.synthetic import write_gguf, write_low_bit
from dibit.engine.checkpoint import resolve_model
from dibit.engine.errors import ConfigError, DibitError
from dibit.kernels import native
from dibit.server.options import parse_integers
from dibit.server.output import write_json

_DIBIT = "from dibit.server.cli import main; main()"
_MARGIN_TOKENS = 64


@dataclass(frozen=True)
class Work:
    """What every turn does.

    prompt_len        tokens of the prompt whose prefill is timed, and after which one sequence decodes
    batch_prompt_len  tokens of each prompt before the decode of every batch
    gen_len           tokens decoded of each sequence
    batch_sizes       with 1 as the first
    """

    prompt_len: int = 512
    batch_prompt_len: int = 32
    gen_len: int = 64
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    threads: int = 1

    def __post_init__(self) -> None:
        if min(self.prompt_len, self.batch_prompt_len, self.gen_len, *self.batch_sizes) < 1:
            raise ConfigError("lengths and batch sizes must be at least 1")
        if self.batch_sizes[0] != 1:
            raise ConfigError(
                f"the first batch size is {self.batch_sizes[0]}; start with 1, which shares are measured at"
            )

    @property
    def long_decode(self) -> str:
        return f"decode 1 after {self.prompt_len}"


@dataclass(frozen=True)
class Comparison:
    """All of it, as it is written to the JSON file."""

    command: str
    llama_cpp: str
    pure: bool
    machine: MachineFacts
    work: Work
    rows: list[Row] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


def prepare(case: Case, directory: Path, tools: LlamaCpp, *, pure: bool) -> tuple[Path, Path]:
    """The checkpoint and the GGUF of a case; made where they are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "demo" if case.shape is None else case.name.rpartition("-")[0]
    checkpoint = directory / f"{name}-{case.bits}bit"
    if not checkpoint.exists():
        if case.shape is None:
            from dibit.quantize import quantize_checkpoint

            quantize_checkpoint("demo", checkpoint, method="rtn", bits=case.bits, group_size=64)
        else:
            shutil.rmtree(checkpoint.with_name(checkpoint.name + ".partial"), ignore_errors=True)
            write_low_bit(checkpoint, case.shape, bits=case.bits)
    model = directory / f"{name}-{case.type}{'-pure' if pure else ''}.gguf"
    if not model.exists():
        source = directory / f"{name}-F16.gguf"
        if case.shape is None:
            source = resolve_model("demo")
        elif not source.exists():
            write_gguf(source, case.shape)
        tools.quantize(source, model, case.type, pure=pure)
    return checkpoint, model


def measure_dibit(case: Case, checkpoint: Path, work: Work, repeat: int) -> Turn:
    engine = _engine(case, work)
    held = _one_run(case, checkpoint, work, prompt_len=work.prompt_len, gen_len=work.gen_len)
    started = _one_run(case, checkpoint, work, prompt_len=1, gen_len=1)
    sizes = json.loads(held.stdout)
    [long] = _bench_decode(checkpoint, engine, work, [1], prompt_len=work.prompt_len)
    short = _bench_decode(checkpoint, engine, work, work.batch_sizes, prompt_len=work.batch_prompt_len)
    return Turn(
        case=case.name,
        side="dibit",
        repeat=repeat,
        tok_s={
            "prefill": long["prefill_tok_s"],
            **{f"decode {one['batch']}": one["decode_tok_s"] for one in short},
            work.long_decode: long["decode_tok_s"],
        },
        start_s=started.seconds,
        peak_rss_bytes=held.peak_rss_bytes,
        token_bytes=long["weight_bytes_per_token"],
        bandwidth_gb_s=short[0]["bandwidth_gb_s"],
        tape_share=short[0]["tape_share"],
        packed_bytes=sizes["weight_bytes"] + sizes["kv_bytes"],
    )


def _engine(case: Case, work: Work) -> list[str]:
    return ["--head-bits", str(case.head_bits), "--threads", str(work.threads)]


def _one_run(case: Case, checkpoint: Path, work: Work, *, prompt_len: int, gen_len: int) -> Ran:
    lengths = ["--prompt-len", str(prompt_len), "--gen-len", str(gen_len)]
    return run([sys.executable, "-m", "dibit.bench.one_run", str(checkpoint), *_engine(case, work), *lengths])


def _bench_decode(
    checkpoint: Path, engine: Sequence[str], work: Work, batches: Sequence[int], *, prompt_len: int
) -> list[dict[str, float]]:
    # The first sequence decodes while the others are still prefilled, at least 128 tokens a step.
    longest = prompt_len + work.gen_len + max(batches) * (1 + prompt_len // 128) + _MARGIN_TOKENS
    settings = {
        "--prompt-len": prompt_len,
        "--gen-len": work.gen_len,
        "--batch-sizes": ",".join(map(str, batches)),
        "--max-num-seqs": max(batches),
        "--max-model-len": longest,
        "--repeats": 1,
    }
    with tempfile.TemporaryDirectory(prefix="dibit-compare-") as directory:
        out = Path(directory) / "decode.json"
        words = [str(word) for pair in settings.items() for word in pair]
        run([sys.executable, "-c", _DIBIT, "bench", "decode", checkpoint, *engine, *words, "--json", out])
        found: list[dict[str, float]] = json.loads(out.read_text())
        return found


def measure_llama_cpp(case: Case, model: Path, tools: LlamaCpp, work: Work, repeat: int) -> Turn:
    batched = partial(tools.batched, model, threads=work.threads)
    [long], held = batched(prompt_len=work.prompt_len, gen_len=work.gen_len, sequences=[1])
    _, started = batched(prompt_len=1, gen_len=1, sequences=[1])
    short, _ = batched(prompt_len=work.batch_prompt_len, gen_len=work.gen_len, sequences=work.batch_sizes)
    return Turn(
        case=case.name,
        side="llama.cpp",
        repeat=repeat,
        tok_s={
            "prefill": long.prefill_tok_s,
            **{f"decode {one.sequences}": one.decode_tok_s for one in short},
            work.long_decode: long.decode_tok_s,
        },
        start_s=started.seconds,
        peak_rss_bytes=held.peak_rss_bytes,
        token_bytes=tensor_bytes(model),
    )


def compare(
    cases: Sequence[Case], tools: LlamaCpp, work: Work, *, directory: Path, repeats: int, pure: bool, out: Path
) -> Comparison:
    """Takes turns and writes the file after every one, so that an interrupted run leaves what it has."""
    files = {case.name: prepare(case, directory, tools, pure=pure) for case in cases}
    for case in cases:
        # Packs the weights, which is in nobody's start after the first and would be in the first one's peak.
        _one_run(case, files[case.name][0], work, prompt_len=1, gen_len=1)
    turns: list[Turn] = []
    result = _comparison(cases, tools, work, turns, pure=pure)
    for repeat in range(repeats):
        for case in cases:
            checkpoint, model = files[case.name]
            ours = partial(measure_dibit, case, checkpoint, work, repeat)
            theirs = partial(measure_llama_cpp, case, model, tools, work, repeat)
            # Who goes first changes, so that a drift of the machine favours neither.
            for measure in (ours, theirs) if repeat % 2 == 0 else (theirs, ours):
                turn = measure()
                turns.append(turn)
                speeds = ", ".join(f"{name} {value:.1f}" for name, value in turn.tok_s.items())
                print(f"{case.name} {turn.side} {repeat + 1}/{repeats}: {speeds} tok/s", file=sys.stderr, flush=True)
                result = _comparison(cases, tools, work, turns, pure=pure)
                write_json(result, str(out))
    return result


def _comparison(cases: Sequence[Case], tools: LlamaCpp, work: Work, turns: Sequence[Turn], *, pure: bool) -> Comparison:
    return Comparison(
        command=shlex.join(["python", "-m", "dibit.bench.compare_llama_cpp", *sys.argv[1:]]),
        llama_cpp=tools.version(),
        pure=pure,
        machine=machine_facts(),
        work=work,
        rows=[row for case in cases for row in rows_of(case, turns)],
        turns=list(turns),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--llama-cpp-bin", type=Path, help="directory with llama-bench, llama-batched-bench, ...")
    where.add_argument("--llama-cpp-source", type=Path, help="llama.cpp's source, built first (cmake, a compiler)")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="default: all")
    parser.add_argument("--work-dir", type=Path, default=Path("models/compare"), help="where model files are kept")
    parser.add_argument("--out", type=Path, default=Path("bench/results/llama-cpp.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: every core this process may use")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--batch-prompt-len", type=int, default=32, help="of each prompt before decode")
    parser.add_argument("--gen-len", type=int, default=64)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument(
        "--avx2",
        action="store_true",
        help="both sides as on a processor with AVX2 and nothing newer; --llama-cpp-bin has to be built so",
    )
    parser.add_argument("--pure", action="store_true", help="llama.cpp's head in the type of the rest")
    asked = parser.parse_args()
    if asked.avx2:
        # Read when the library is loaded, here and in every process started from here.
        os.environ["DIBIT_ISA"] = "avx2"
    try:
        named = asked.cases.split(",")
        if unknown := set(named) - {case.name for case in CASES}:
            raise ConfigError(f"case {min(unknown)!r}; there are: {', '.join(case.name for case in CASES)}")
        threads = asked.threads or native.usable_cores()
        tools = (
            LlamaCpp(asked.llama_cpp_bin)
            if asked.llama_cpp_bin is not None
            else build(
                asked.llama_cpp_source,
                asked.work_dir / ("llama.cpp-avx2" if asked.avx2 else "llama.cpp"),
                jobs=threads,
                avx2=asked.avx2,
            )
        )
        work = Work(
            prompt_len=asked.prompt_len,
            batch_prompt_len=asked.batch_prompt_len,
            gen_len=asked.gen_len,
            batch_sizes=tuple(parse_integers(asked.batch_sizes)),
            threads=threads,
        )
        result = compare(
            [case for case in CASES if case.name in named],
            tools,
            work,
            directory=asked.work_dir,
            repeats=asked.repeats,
            pure=asked.pure,
            out=asked.out,
        )
    except DibitError as error:
        sys.exit(f"compare: {error}")
    bandwidth = statistics.median(turn.bandwidth_gb_s for turn in result.turns if turn.side == "dibit")
    print(f"{result.machine.cpu}, {work.threads} threads, {result.machine.isa}; reads {bandwidth:.1f} GB/s")
    print(f"dibit {result.machine.commit}; llama.cpp {result.llama_cpp}\n")
    print(format_rows(result.rows))


if __name__ == "__main__":
    main()
