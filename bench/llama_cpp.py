"""llama.cpp's own programs: building them, making its files, and reading what they measure.

Its source comes, among other places, inside the source distribution of llama-cpp-python (vendor/llama.cpp).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from dibit.engine.errors import ConfigError

PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=OFF",
    "LLAMA_CURL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
)
_AVX2 = ("GGML_NATIVE=OFF", *(f"GGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")))
# GCC (12, at least) takes `_tile_loadconfig` to read 8 bytes of its 64 and drops the stores to the rest as dead: the
# first product with AMX then ends in a general protection fault.
_TILE_LOADCONFIG = """#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
static inline void tile_loadconfig_64(const void * config) {
    __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64]) config));
}
#define _tile_loadconfig tile_loadconfig_64
#endif
"""
_ERROR_LINES = 8
# The kernel counts the memory of the process that started a program into the program's peak. This one is small.
_LAUNCHER = """
import json, os, subprocess, sys, time
started_s = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
found = [time.perf_counter() - started_s, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
"""
_LEAST_CONTEXT = 256


@dataclass(frozen=True)
class Ran:
    """A finished process: seconds from start to end, the most memory that it held, and what it wrote to stdout."""

    seconds: float
    peak_rss_bytes: int
    stdout: str


@dataclass(frozen=True)
class Batch:
    """A line of llama-batched-bench: `sequences` prompts of `prompt_len` tokens, then `gen_len` tokens of each."""

    sequences: int
    prompt_len: int
    gen_len: int
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True)
class LlamaCpp:
    """Built programs in `directory`."""

    directory: Path

    def __post_init__(self) -> None:
        if missing := [name for name in PROGRAMS if not (self.directory / name).is_file()]:
            raise ConfigError(
                f"{self.directory} has no {missing[0]}; --llama-cpp-bin names a directory with {', '.join(PROGRAMS)}, "
                "--llama-cpp-source one to build them from"
            )

    def version(self) -> str:
        done = subprocess.run(
            [self.directory / "llama-bench", "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("version", "built"))]
        return ", ".join(lines) or "unknown"

    def quantize(self, source: Path, out: Path, type: str, *, pure: bool = False) -> None:
        """Write `out` in one of its types. `pure`: every tensor in that type, the head and embedding too."""
        aside = out.with_name(out.name + ".partial")
        options = ["--allow-requantize", *(["--pure"] if pure else [])]
        run([self.directory / "llama-quantize", *options, source, aside, type])
        aside.rename(out)

    def batched(
        self, model: Path, *, prompt_len: int, gen_len: int, sequences: Sequence[int], threads: int
    ) -> tuple[list[Batch], Ran]:
        """Prompts of each sequence are its own, and all are prefilled before the first token is drawn."""
        # Its warm-up needs room for 16 tokens.
        context = max(_LEAST_CONTEXT, max(sequences) * (prompt_len + gen_len))
        lists = {"-npp": prompt_len, "-ntg": gen_len, "-npl": ",".join(map(str, sequences))}
        settings = {"-m": model, "-c": context, "-b": 2048, "-ub": 512, "-t": threads, "-tb": threads, **lists}
        words = [str(word) for pair in settings.items() for word in pair]
        ran = run([self.directory / "llama-batched-bench", *words, "--output-format", "jsonl"])
        lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        found = [Batch(one["pl"], one["pp"], one["tg"], one["speed_pp"], one["speed_tg"]) for one in lines]
        if [batch.sequences for batch in found] != list(sequences):
            raise ConfigError(f"llama-batched-bench answered for {len(found)} of {len(sequences)} batches on {model}")
        return found, ran


def build(source: Path, out: Path, *, jobs: int, avx2: bool = False) -> LlamaCpp:
    """Compile for this machine's processor, or for one that has AVX2 and nothing newer; minutes to half an hour. What
    is built already is kept."""
    if not (source / "CMakeLists.txt").is_file():
        raise ConfigError(f"{source} has no CMakeLists.txt; --llama-cpp-source names llama.cpp's own directory")
    out.mkdir(parents=True, exist_ok=True)
    header = out.absolute() / "tile_loadconfig.h"
    if not header.exists():
        header.write_text(_TILE_LOADCONFIG)
    flags = (*_OPTIONS, *(_AVX2 if avx2 else ("GGML_NATIVE=ON",)), f"CMAKE_CXX_FLAGS=-include {header}")
    run(["cmake", "-S", source, "-B", out, *(f"-D{flag}" for flag in flags)], shown=True)
    run(["cmake", "--build", out, "--target", *PROGRAMS, "-j", str(jobs)], shown=True)
    return LlamaCpp(out / "bin")


def tensor_bytes(model: Path) -> int:
    """Of all tensors of a GGUF: with a tied head, what a decode step reads."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors)


def run(words: Sequence[str | Path], *, shown: bool = False) -> Ran:
    """Run a program to its end. Raises ConfigError with the end of what it wrote when it fails or is not there.

    shown  its output goes to the terminal
    """
    if shutil.which(words[0]) is None:
        raise ConfigError(f"cannot run {words[0]}: there is no such program here")
    with tempfile.TemporaryDirectory(prefix="dibit-run-") as directory:
        facts, out, told = (Path(directory) / name for name in ("facts", "stdout", "stderr"))
        with out.open("wb") as stdout, told.open("wb") as stderr:
            # A session of its own, so that nothing outlives an interrupted run.
            launcher = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCHER, facts, *words],
                stdout=sys.stderr if shown else stdout,
                stderr=None if shown else stderr,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                launcher.wait()
            except BaseException:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
                raise
        text = out.read_text("utf-8", "replace")
        seconds, peak_rss, status = (0.0, 0, launcher.returncode)
        if not status:
            seconds, peak_rss, status = json.loads(facts.read_text())
        if status:
            last = "\n".join((text + told.read_text("utf-8", "replace")).splitlines()[-_ERROR_LINES:])
            raise ConfigError(f"{Path(words[0]).name} ended with status {status}:\n{last}")
    # Linux counts in KiB, macOS in bytes.
    return Ran(seconds, peak_rss * (1 if sys.platform == "darwin" else 1024), text)
