"""Speed of the quantized linear per shape and width, beside the machine's limit and torch's own linear.

Every op runs on weights that are not in any cache: as many copies as exceed the last-level cache several times are
used in turn. Read bandwidth, the quantized op, torch fp32 and torch bf16 are timed in alternation, and medians are
taken, so that a change of the machine's mood meets all four.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.bench.bandwidth import ReadLoop
from dibit.bench.machine import MachineFacts, last_level_cache_bytes, machine_facts
from dibit.kernels import native, qlinear_cpu
from dibit.kernels.formats import Format, QTensor

ROUNDS = 7
_CACHES_COVERED = 2.5
_LEAST_BYTES = 256 << 20
_LEAST_READ_BYTES = 1 << 20
# Weights, the float copies and the read buffer stand in memory together.
_SHARE_OF_FREE_MEMORY = 0.15


@dataclass(frozen=True)
class OpResult:
    """One shape [n, k] at one width for m tokens; times are medians over `calls`.

    weight_bytes     codes, scales and zero points as they lie in memory
    weight_gb_s      weight_bytes per second, 1e9 bytes
    bandwidth_gb_s   median read bandwidth of the same run on the same threads
    bandwidth_share  weight_gb_s / bandwidth_gb_s
    gmac_s           m * n * k products per second, 1e9
    fp32_us, bf16_us torch.nn.functional.linear of the same shape on the same threads
    """

    op: str
    n: int
    k: int
    m: int
    bits: int
    group_size: int
    time_us: float
    calls: int
    weight_bytes: int
    weight_gb_s: float
    bandwidth_gb_s: float
    bandwidth_share: float
    gmac_s: float
    fp32_us: float
    bf16_us: float
    speedup_fp32: float
    speedup_bf16: float
    threads: int
    isa: str
    machine: MachineFacts


@dataclass
class _Timed:
    """One op over weights taken in turn, and the time of each call so far."""

    calls: Sequence[Callable[[], object]]
    next: int = 0
    times_s: list[float] = field(default_factory=list)

    def run(self, least_s: float) -> None:
        """At least two calls and at least `least_s` seconds of them."""
        spent_s, count = 0.0, 0
        while spent_s < least_s or count < 2:
            call = self.calls[self.next % len(self.calls)]
            self.next += 1
            started_s = time.perf_counter()
            call()
            self.times_s.append(time.perf_counter() - started_s)
            spent_s += self.times_s[-1]
            count += 1

    def median_s(self) -> float:
        return statistics.median(self.times_s)


def run_ops(
    shapes: Sequence[tuple[int, int]],
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    group_size: int = 64,
    batch_sizes: Sequence[int] = (1,),
    threads: int | None = None,
    rounds: int = ROUNDS,
    round_s: float = 0.15,
    weight_bytes: int | None = None,
) -> list[OpResult]:
    """Measure the quantized linear for every shape (outputs, inputs), batch size and width.

    threads       None: every core this process may use
    rounds        alternations of the four measurements
    round_s       least time spent on each op per round
    weight_bytes  of the copies taken in turn; None: enough to leave the caches, or what memory allows

    Raises FormatError for a width or group size that does not exist or does not divide a shape, NativeError when the
    C++ kernels are not built.
    """
    formats = [Format(bits=width, group_size=group_size) for width in bits]
    for fmt, (_, k) in product(formats, shapes):
        fmt.groups(k)
    total = _rotation_bytes() if weight_bytes is None else weight_bytes
    results = []
    with _threads(native.usable_cores() if threads is None else threads):
        facts = machine_facts()
        loop = ReadLoop(max(total, _LEAST_READ_BYTES))
        for n, k in shapes:
            floats = {dtype: _float_weights(n, k, dtype, total) for dtype in (torch.float32, torch.bfloat16)}
            for fmt in formats:
                weights = _packed(fmt, n, k, total)
                results += [
                    _measure(weights, floats, torch.randn(m, k), loop, facts, rounds=rounds, round_s=round_s)
                    for m in batch_sizes
                ]
    return results


def format_table(results: Sequence[OpResult]) -> str:
    """The results as text, one line each, under the facts of the machine."""
    if not results:
        return "nothing was measured"
    facts = results[0].machine
    lines = [
        f"{facts.cpu}, {facts.threads} of {facts.cores} cores, {facts.isa}, torch {facts.torch}, commit {facts.commit}",
        f"{'outputs x inputs':>18} {'tokens':>6} {'format':>10} {'time':>11} {'weights':>11} {'of read':>8}"
        f" {'products':>12} {'vs fp32':>8} {'vs bf16':>8}",
    ]
    for r in results:
        name = Format(bits=r.bits, group_size=r.group_size).name
        lines.append(
            f"{f'{r.n} x {r.k}':>18} {r.m:>6} {name:>10} {r.time_us:>8.0f} us {r.weight_gb_s:>6.1f} GB/s"
            f" {r.bandwidth_share:>7.0%} {r.gmac_s:>6.1f} GMAC/s {r.speedup_fp32:>7.1f}x {r.speedup_bf16:>7.1f}x"
        )
    bandwidth = statistics.median(r.bandwidth_gb_s for r in results)
    lines.append(f"read bandwidth measured in the same run, median: {bandwidth:.1f} GB/s")
    return "\n".join(lines)


def _measure(
    weights: list[qlinear_cpu.CpuQWeight],
    floats: dict[torch.dtype, list[Tensor]],
    x: Tensor,
    loop: ReadLoop,
    facts: MachineFacts,
    *,
    rounds: int,
    round_s: float,
) -> OpResult:
    m = x.shape[0]
    n, k = weights[0].shape
    fmt = weights[0].format
    y = torch.empty(m, n)
    quantized = _Timed([partial(qlinear_cpu.qlinear, x, w, out=y) for w in weights])
    fp32, bf16 = (
        _Timed([partial(F.linear, x.to(dtype), w) for w in floats[dtype]]) for dtype in (torch.float32, torch.bfloat16)
    )
    bandwidth = []
    for _ in range(rounds):
        bandwidth.append(loop.gb_s())
        for timed in (quantized, fp32, bf16):
            timed.run(round_s)
    time_s, bandwidth_gb_s = quantized.median_s(), statistics.median(bandwidth)
    weight_gb_s = weights[0].nbytes / time_s / 1e9
    return OpResult(
        op="qlinear",
        n=n,
        k=k,
        m=m,
        bits=fmt.bits,
        group_size=fmt.group_size,
        time_us=time_s * 1e6,
        calls=len(quantized.times_s),
        weight_bytes=weights[0].nbytes,
        weight_gb_s=weight_gb_s,
        bandwidth_gb_s=bandwidth_gb_s,
        bandwidth_share=weight_gb_s / bandwidth_gb_s,
        gmac_s=m * n * k / time_s / 1e9,
        fp32_us=fp32.median_s() * 1e6,
        bf16_us=bf16.median_s() * 1e6,
        speedup_fp32=fp32.median_s() / time_s,
        speedup_bf16=bf16.median_s() / time_s,
        threads=facts.threads,
        isa=facts.isa,
        machine=facts,
    )


def _packed(fmt: Format, n: int, k: int, total: int) -> list[qlinear_cpu.CpuQWeight]:
    """Enough equal weights to fill `total` bytes."""
    w = QTensor(
        codes=torch.randint(0, fmt.qmax + 1, (n, k), dtype=torch.uint8),
        zeros=torch.full((n, fmt.groups(k)), (fmt.qmax + 1) // 2, dtype=torch.uint8),
        scales=torch.full((n, fmt.groups(k)), 0.01, dtype=torch.float16),
        format=fmt,
    )
    weights = [qlinear_cpu.pack(w)]
    while len(weights) * weights[0].nbytes < total:
        weights.append(qlinear_cpu.pack(w))
    return weights


def _float_weights(n: int, k: int, dtype: torch.dtype, total: int) -> list[Tensor]:
    weights = [torch.randn(n, k).to(dtype)]
    while len(weights) * weights[0].nbytes < total:
        weights.append(weights[0].clone())
    return weights


def _rotation_bytes() -> int:
    wanted = max(_LEAST_BYTES, int(_CACHES_COVERED * last_level_cache_bytes()))
    return min(wanted, int(_SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Both thread pools at `count`; put back afterwards."""
    before = native.threads(), torch.get_num_threads()
    native.set_threads(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        native.set_threads(before[0])
        torch.set_num_threads(before[1])
