"""Does the quantizer's memory grow with one block, or with the model? Resident memory over time, at two depths.

    python -m dibit.bench.memory_trace --method gptq --json bench/results/memory-gptq.json

writes a Llama of the shape of a 1B model (random bfloat16 weights, block by block, so that writing takes no memory
either) with 4 and with 16 blocks, quantizes both by `dibit quantize` in a process of its own, and watches that
process. The exit status is 1 when a peak is above --limit-gb, or the deeper model's is above the shallower one's by
more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from dibit.bench.machine import MachineFacts, machine_facts
from dibit.bench.synthetic import LLAMA_1B, Shape, write_tokenizer
from dibit.engine.checkpoint.shard_file import write_shard, write_text
from dibit.engine.errors import ConfigError, DibitError
from dibit.server.options import parse_integers
from dibit.server.output import write_json

_DIBIT = [sys.executable, "-c", "from dibit.server.cli import main; main()"]
_INTERVAL_S = 0.1
# Of a trace that is kept; a peak is never dropped.
_POINTS = 400
_MOST_GROWTH = 1.1


@dataclass(frozen=True)
class Trace:
    """A run of the quantizer.

    source_bytes    weights of the float checkpoint on disk
    peak_rss_bytes  as the system counted it
    trace           (seconds since the start, resident bytes), each the highest of its stretch of time
    """

    method: str
    bits: int
    layers: int
    samples: int
    sequence_length: int
    source_bytes: int
    seconds: float
    peak_rss_bytes: int
    trace: tuple[tuple[float, int], ...]
    machine: MachineFacts


def write_float(out: Path, shape: Shape, *, seed: int = 0) -> None:
    """A bfloat16 checkpoint with random weights and a tied head: a shard for every block, one for the rest."""
    aside = out.with_name(out.name + ".partial")
    aside.mkdir(parents=True, exist_ok=True)
    write_tokenizer(aside, shape.vocab)
    draw = torch.Generator().manual_seed(seed)
    layers = range(shape.layers)
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "embedding.safetensors": {
            "model.embed_tokens.weight": (shape.vocab, shape.hidden),
            "model.norm.weight": (shape.hidden,),
        }
    }
    shards |= {f"block-{layer:03}.safetensors": dict(_block(shape, layer)) for layer in layers}
    sizes = {name: size for tensors in shards.values() for name, size in tensors.items()}
    for file, tensors in shards.items():
        layout = {name: (torch.bfloat16, size) for name, size in tensors.items()}
        write_shard(aside / file, layout, lambda name: _random(sizes[name], draw))
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    write_text(aside / "model.safetensors.index.json", json.dumps(index, indent=2))
    write_text(aside / "config.json", json.dumps(shape.config() | {"torch_dtype": "bfloat16"}, indent=2))
    aside.rename(out)


def _block(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, _, n, k in shape.linears():
        yield f"model.layers.{layer}.{name}.weight", (n, k)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{layer}.{norm}.weight", (shape.hidden,)


def _random(size: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Outputs as large as inputs; norms of ones."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    values = torch.randn(size, generator=draw, dtype=torch.bfloat16)
    return values.mul_(size[1] ** -0.5)


def watch(words: list[str]) -> tuple[float, int, list[tuple[float, int]]]:
    """Run a program: seconds, peak resident bytes, and resident bytes over time.

    Raises ConfigError when it fails.
    """
    began = time.perf_counter()
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    found: list[tuple[float, int]] = []
    try:
        seen = psutil.Process(process.pid)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            found.append((time.perf_counter() - began, seen.memory_info().rss))
            time.sleep(_INTERVAL_S)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ConfigError(f"{words[0]} ended with status {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return time.perf_counter() - began, peak, found


def thinned(trace: list[tuple[float, int]], points: int = _POINTS) -> tuple[tuple[float, int], ...]:
    """At most `points` of them, the highest of each stretch."""
    step = -(-len(trace) // points)
    stretches = [trace[i : i + step] for i in range(0, len(trace), max(1, step))]
    return tuple(max(stretch, key=lambda point: point[1]) for stretch in stretches)


def trace(
    shape: Shape, work_dir: Path, *, method: str, bits: int, samples: int, sequence_length: int, options: list[str]
) -> Trace:
    """Quantize a random model of that shape into `work_dir`, watched. Raises ConfigError when that fails."""
    source = work_dir / f"float-{shape.hidden}x{shape.layers}"
    if not source.exists():
        write_float(source, shape)
    words = [*_DIBIT, "quantize", str(source), "--out", str(work_dir / f"{source.name}-{method}-{bits}")]
    words += ["--method", method, "--bits", str(bits), "--overwrite", *options]
    if method != "rtn":
        text = work_dir / "text.txt"
        letters = random.Random(0)
        # The tokenizer has a token for every byte.
        text.write_text("".join(chr(letters.randrange(32, 127)) for _ in range(samples * sequence_length + 1)))
        words += ["--calibration", str(text), "--samples", str(samples), "--sequence-length", str(sequence_length)]
    seconds, peak, found = watch(words)
    return Trace(
        method=method,
        bits=bits,
        layers=shape.layers,
        samples=samples if method != "rtn" else 0,
        sequence_length=sequence_length,
        source_bytes=sum(file.stat().st_size for file in source.glob("*.safetensors")),
        seconds=seconds,
        peak_rss_bytes=peak,
        trace=thinned(found),
        machine=machine_facts(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--layers", default="4,16", help="depths that are compared")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("-O", dest="options", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--limit-gb", type=float, default=6.0)
    parser.add_argument("--work-dir", type=Path, default=Path("models/memory"))
    parser.add_argument("--json", required=True)
    asked = parser.parse_args()
    found: list[Trace] = []
    try:
        asked.work_dir.mkdir(parents=True, exist_ok=True)
        for layers in parse_integers(asked.layers):
            one = trace(
                replace(LLAMA_1B, layers=layers),
                asked.work_dir,
                method=asked.method,
                bits=asked.bits,
                samples=asked.samples,
                sequence_length=asked.sequence_length,
                options=[word for option in asked.options for word in ("-O", option)],
            )
            found.append(one)
            write_json(found, asked.json)
            print(
                f"{one.method}, {one.layers} blocks ({one.source_bytes / 1e9:.2f} GB of floats): peak "
                f"{one.peak_rss_bytes / 1e9:.2f} GB, {one.seconds:.0f} s"
            )
    except DibitError as error:
        sys.exit(f"memory_trace: {error}")
    return int(not within(found, limit_gb=asked.limit_gb))


def within(found: list[Trace], *, limit_gb: float) -> bool:
    """Whether every peak is below the limit, and depth adds little to it."""
    peaks = [one.peak_rss_bytes for one in sorted(found, key=lambda one: one.layers)]
    return max(peaks) <= limit_gb * 1e9 and peaks[-1] <= peaks[0] * _MOST_GROWTH


if __name__ == "__main__":
    sys.exit(main())
