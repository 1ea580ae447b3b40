"""Everything that only a machine with an NVIDIA GPU can tell, in one run of at most ten minutes: `make gpu`.

Sections (gpu_sections.py) one after another, each with its share of the time: the checks of gpu_checks.py; the
quantized linear at the shapes of known models, beside the prediction of `dibit kernels report`; the peers of
gpu_peers.py; tokens per second of a model. One JSON file has all of it, written after every section, and pictures of
it lie beside that. What is missing, fails, crashes or takes too long is noted with its reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from dibit.bench.charts import read_results
from dibit.bench.gpu_charts import gpu_tables
from dibit.bench.gpu_records import GpuRun, Note, read
from dibit.bench.plot import plot
from dibit.kernels.triton.availability import unavailable
from dibit.server.output import write_json

SHARES_S = {"checks": 190, "products": 130, "torch": 30, "gemlite": 80, "marlin": 40, "decoding": 70}
"""Seconds of the usual nine minutes. What a section leaves is the next one's."""
GRACE_S = 10
"""For a section to end what it is at; then it is killed."""

Start = Callable[[Sequence[str], float], str | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every check passed, 1 when one failed or none was made, 2 without a GPU."""
    total_s = sum(SHARES_S.values())
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("--out", type=Path, help="JSON file; left out: bench/results/gpu-NAME.json")
    parser.add_argument("--model", help="a quantized checkpoint to decode with; left out: the demo at 4 bits")
    parser.add_argument("--minutes", type=float, default=total_s / 60, help="for everything; the sections share them")
    parser.add_argument("--checks-only", action="store_true", help="check, do not time")
    options = parser.parse_args(arguments)
    if (missing := unavailable()) is not None:
        print(f"gpu: {missing}", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    run = GpuRun(torch.cuda.get_device_name(), f"{major}.{minor}", torch.__version__, version("triton"))
    out = options.out or Path("bench/results") / f"gpu-{run.gpu.replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    scale = 60 * options.minutes / total_s
    shares = {"checks": SHARES_S["checks"]} if options.checks_only else SHARES_S
    run_sections(run, {name: scale * share for name, share in shares.items()}, out, model=options.model)
    results = read_results([out])
    for table in gpu_tables(results.gpus):
        print("\n".join([table.title, *("  ".join(cells) for cells in (table.header, *table.rows))]))
    pictures = [] if options.checks_only else plot(results, out.with_suffix(""))
    print("\n".join(f"written: {path}" for path in (out, *pictures)))
    return 0 if run.checks and all(check.passed for check in run.checks) else 1


def run_sections(
    run: GpuRun, shares_s: dict[str, float], out: Path, *, model: str | None, start: Start | None = None
) -> None:
    """Adds to `run` what every section finds, and writes it to `out` after each."""
    start, deadline = start or started, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for name, share_s in shares_s.items():
            deadline += share_s
            left_s = deadline - time.monotonic()
            rows = Path(directory) / f"{name}.jsonl"
            command = [name, "--rows", str(rows), "--seconds", f"{left_s:.0f}"]
            ended = start([*command, *(["--model", model] if model else [])], left_s + GRACE_S)
            run.add(read(rows))
            if ended is not None:
                run.add([Note(name, ended)])
                print(run.notes[-1], file=sys.stderr)
            write_json(run, str(out))


def started(arguments: Sequence[str], limit_s: float) -> str | None:
    """Run a section to its end; why it did not get there, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dibit.bench.gpu_sections", *arguments], timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"killed after {limit_s:.0f} s"
    return None if done.returncode == 0 else f"its process ended with status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
