"""llama.cpp's own programs: building them, making its files, and reading what they measure.

Its source comes, among other places, inside the source distribution of llama-cpp-python (vendor/llama.cpp).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from dibit.engine.errors import ConfigError

PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    "BUILD_SHARED_LIBS=OFF",
    "LLAMA_CURL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
)
_ERROR_LINES = 8
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


def build(source: Path, out: Path, *, jobs: int) -> LlamaCpp:
    """Compile for this machine's processor; minutes to half an hour. What is built already is kept."""
    if not (source / "CMakeLists.txt").is_file():
        raise ConfigError(f"{source} has no CMakeLists.txt; --llama-cpp-source names llama.cpp's own directory")
    options = [f"-D{option}" for option in (*_OPTIONS, f"CMAKE_CXX_FLAGS={_cxx_flags()}")]
    run(["cmake", "-S", source, "-B", out, *options], shown=True)
    run(["cmake", "--build", out, "--target", *PROGRAMS, "-j", str(jobs)], shown=True)
    return LlamaCpp(out / "bin")


def _cxx_flags() -> str:
    """GCC (12, at least) takes `_tile_loadconfig` to read 8 bytes of its 64 and drops the stores to the rest as dead:
    its first product with AMX then ends in a general protection fault."""
    try:
        has_tiles = "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_tiles = False
    return "-fno-tree-dse -fno-dse" if has_tiles else ""


def tensor_bytes(model: Path) -> int:
    """Of all tensors of a GGUF: with a tied head, what a decode step reads."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors)


def run(words: Sequence[str | Path], *, shown: bool = False) -> Ran:
    """Run a program to its end. Raises ConfigError with the end of what it wrote when it fails or is not there.

    shown  its output goes to the terminal
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as told:
        started_s = time.perf_counter()
        try:
            process = subprocess.Popen(
                [str(word) for word in words],
                stdout=sys.stderr if shown else out,
                stderr=None if shown else told,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ConfigError(f"cannot run {words[0]}: {error}") from error
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started_s
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        told.seek(0)
        stdout = out.read().decode("utf-8", "replace")
        if process.returncode:
            last = "\n".join((stdout + told.read().decode("utf-8", "replace")).splitlines()[-_ERROR_LINES:])
            raise ConfigError(f"{Path(words[0]).name} ended with status {process.returncode}:\n{last}")
    # Linux counts in KiB, macOS in bytes.
    return Ran(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), stdout)
