"""Where a decode step's time goes: every call of its tape timed in place, beside what reading its bytes takes.

The tape of the last step is run again and again, which computes the same step: no Python between the calls, the thread
pool awake, everything as in serving but for two looks at the clock per call. The floor of an op is the bytes it cannot
avoid reading (weights, or the keys and values of the step's sequences) over the read bandwidth of the same run.
Small models may lie below it: their weights stay in the processor's cache from step to step.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Decoder, Linear, PackedLinear, SideBySide
from dibit.engine.runner import ModelRunner
from dibit.kernels.qlinear_cpu import CpuQWeight

ATTENTION = "dibit_paged_attention"


@dataclass(frozen=True)
class OpTime:
    """All calls of one op within a decode step of one model and batch; times are medians over `repeats` steps.

    op        the op, and the site for a quantized linear
    calls     in a step
    us        of all calls together
    share     of the step
    bytes     weights or cache that all calls read
    floor_us  bytes at the read bandwidth of the same run
    """

    model: str
    batch: int
    op: str
    calls: int
    us: float
    share: float
    bytes: int
    floor_us: float
    repeats: int


def profile_step(
    runner: ModelRunner, *, model: str, batch: int, lengths: Sequence[int], bandwidth_gb_s: float, repeats: int = 50
) -> list[OpTime]:
    """Ops of the step that decoded `batch` sequences last, `lengths` their tokens in the cache, the slowest first.

    Raises ConfigError when such steps are not replayed.
    """
    tape = runner.decode_tape(batch)
    if tape is None:
        raise ConfigError(
            "only steps that are replayed can be profiled; this model runs op by op (float weights, --no-tape, or an "
            "op without a body in C++). Profile a quantized model on the cpu backend"
        )
    linears = dict(_linears(runner.decoder))
    kv_bytes = sum(lengths) * (runner.cache.k[0][0, :, 0].nbytes + runner.cache.v[0][0, :, 0].nbytes)
    labels, sizes = [], []
    for name, address in tape.first_arguments():
        site, nbytes = linears.get(address, ("", kv_bytes if name == ATTENTION else 0))
        labels.append(name.removeprefix("dibit_") + (f" {site}" if site and name != "dibit_embedding" else ""))
        sizes.append(nbytes if name != "dibit_embedding" else 0)
    tape.run_timed()
    runs = [tape.run_timed() for _ in range(repeats)]
    times_us = [statistics.median(run[i] for run in runs) / 1e3 for i in range(len(tape))]
    total_us = sum(times_us)
    found = []
    for label in dict.fromkeys(labels):
        calls = [i for i, other in enumerate(labels) if other == label]
        us, nbytes = sum(times_us[i] for i in calls), sum(sizes[i] for i in calls)
        floor_us = nbytes / bandwidth_gb_s / 1e3
        found.append(OpTime(model, batch, label, len(calls), us, us / total_us, nbytes, floor_us, repeats))
    return sorted(found, key=lambda op: -op.us)


def format_profile(ops: Sequence[OpTime]) -> str:
    """The ops of one step as a Markdown table."""
    lines = [
        f"{ops[0].model}, {ops[0].batch} sequences, {sum(op.us for op in ops) / 1e3:.2f} ms",
        "",
        "| op | calls | us | of the step | us a call | MB | floor us | of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op in ops:
        ratio = f"{op.us / op.floor_us:.1f}x" if op.floor_us else ""
        lines.append(
            f"| {op.op} | {op.calls} | {op.us:.0f} | {op.share:.1%} | {op.us / op.calls:.1f} | {op.bytes / 1e6:.2f} | "
            f"{op.floor_us:.0f} | {ratio} |"
        )
    return "\n".join(lines)


def _linears(decoder: Decoder) -> Iterator[tuple[int, tuple[str, int]]]:
    """Name of the site and bytes, by the address that calls are recorded with."""
    for block in decoder.blocks:
        for key, linear in block.linears.items():
            yield from _packed(key, linear)
    yield from _packed("head", decoder.head)


def _packed(name: str, linear: Linear) -> Iterator[tuple[int, tuple[str, int]]]:
    if isinstance(linear, SideBySide):
        for segment in linear.segments:
            yield from _packed(name, segment)
    elif isinstance(linear, PackedLinear) and isinstance(linear.weight, CpuQWeight):
        yield ctypes.addressof(linear.weight.native), (name, linear.nbytes)
