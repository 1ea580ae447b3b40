"""How long `dibit serve` takes from its start to an open port and to a first token, and what it holds in memory.

Each start is a process of its own, as a user starts it. Cold: nothing packed is kept, and the system is asked to
forget the model's files. Warm: what the start before left is there. The clock starts before the process does; memory
is the system's own high-water mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from dibit.bench.machine import MachineFacts, machine_facts
from dibit.engine.checkpoint import resolve_model
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.memory_plan import plan_model

TIMEOUT_S = 600.0
_POLL_S = 0.01
_LEFT_OUT = ("cache", "cache_dir")


@dataclass(frozen=True)
class Start:
    """Seconds since the process was started, bytes at most and at the end.

    anonymous_bytes  memory of the process's own, after the first token; the rest is mapped files, shared
    """

    listening_s: float
    first_token_s: float
    peak_rss_bytes: int
    rss_bytes: int
    anonymous_bytes: int


@dataclass(frozen=True)
class StartupResult:
    """Medians over the starts of one kind.

    weight_bytes, kv_bytes  as `dibit plan` has them; pages of the KV cache that nothing was written to are in no peak
    overhead_bytes          peak memory beyond the weights: interpreter, libraries, buffers, used pages of the KV cache
    """

    model: str
    kind: Literal["cold", "warm"]
    listening_s: float
    first_token_s: float
    peak_rss_bytes: int
    weight_bytes: int
    kv_bytes: int
    overhead_bytes: int
    starts: tuple[Start, ...]
    machine: MachineFacts


def run_startup(model: str, config: EngineConfig, *, repeats: int) -> list[StartupResult]:
    """Cold starts, then warm ones. Raises ConfigError for a server that does not come up, with what it said."""
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; at least 1 is needed")
    plan, path, facts = plan_model(model, config), resolve_model(model), machine_facts()
    with tempfile.TemporaryDirectory(prefix="dibit-startup-") as directory:
        cache = Path(directory)
        cold = []
        for _ in range(repeats):
            for file in cache.iterdir():
                file.unlink()
            forget(path)
            cold.append(start(model, config, cache=cache))
        warm = [start(model, config, cache=cache) for _ in range(repeats)]

    def result(kind: Literal["cold", "warm"], starts: list[Start]) -> StartupResult:
        peak = int(statistics.median(one.peak_rss_bytes for one in starts))
        return StartupResult(
            model=model,
            kind=kind,
            listening_s=statistics.median(one.listening_s for one in starts),
            first_token_s=statistics.median(one.first_token_s for one in starts),
            peak_rss_bytes=peak,
            weight_bytes=plan.weight_bytes,
            kv_bytes=plan.kv_bytes,
            overhead_bytes=peak - plan.weight_bytes,
            starts=tuple(starts),
            machine=facts,
        )

    return [result("cold", cold), result("warm", warm)]


def start(model: str, config: EngineConfig, *, cache: Path) -> Start:
    """One start of a server, one token from it, and its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    program = [sys.executable, "-c", "from dibit.server.cli import main; main()", "serve", model]
    command = [*program, "--port", str(port), "--cache-dir", str(cache), *arguments(config)]
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            for _ in _while_alive(process, started_s):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            else:
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise ConfigError(f"`dibit serve {model}` did not come up in {TIMEOUT_S:g} s or ended: {last}")
            listening_s = time.monotonic() - started_s
            _first_token(f"http://127.0.0.1:{port}")
            return Start(listening_s, time.monotonic() - started_s, *_memory(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def arguments(config: EngineConfig) -> list[str]:
    """The options of `dibit serve` that give this config, but for the cache."""
    words = []
    for field in dataclasses.fields(EngineConfig):
        value = getattr(config, field.name)
        if field.name in _LEFT_OUT or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def forget(path: Path) -> None:
    """Asks the system to drop a model's files from its page cache; pages that another process maps stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (p for p in ([path] if path.is_file() else path.iterdir()) if p.is_file()):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def format_table(results: Sequence[StartupResult]) -> str:
    """For people."""
    lines = [
        f"{'start':6}{'listening s':>13}{'first token s':>15}{'peak MB':>10}{'weights':>9}{'rest':>10}{'KV room':>9}"
    ]
    for r in results:
        sizes = "".join(
            f"{size / 1e6:>{width}.0f}"
            for size, width in ((r.peak_rss_bytes, 10), (r.weight_bytes, 9), (r.overhead_bytes, 10), (r.kv_bytes, 9))
        )
        lines.append(f"{r.kind:6}{r.listening_s:>13.2f}{r.first_token_s:>15.2f}{sizes}")
    return "\n".join(lines)


def _while_alive(process: subprocess.Popen[bytes], started_s: float) -> Iterator[None]:
    while process.poll() is None and time.monotonic() - started_s < TIMEOUT_S:
        yield
        time.sleep(_POLL_S)


def _first_token(root: str) -> None:
    with httpx.Client(base_url=root, timeout=TIMEOUT_S, trust_env=False) as client:
        name = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": name, "prompt": "The", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        client.post("/v1/completions", json=body).raise_for_status()


def _memory(pid: int) -> tuple[int, int, int]:
    """Peak, present and anonymous bytes of a process. Raises ConfigError where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise ConfigError("the memory of a process is read from /proc, which this system lacks") from error
    found = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    return found["VmHWM"], found["VmRSS"], found["RssAnon"]
