"""GPUs as their vendors describe them, what a kernel's time should be on each, and what no kernel may do.

The prediction of a launch is the largest of these times, and the launch itself:

    bytes / bandwidth        every byte of weights, scales, zero points, activations and outputs, once
    instructions / rate      weights * instructions per weight / (128 lanes * processors * clock)
    products / tensor rate   2 * tokens * rows * columns / the rate of float16 with float32 sums, or of int8 where the
                             product is one of integers; padding included
    bytes / a program's      where one program reads a row by itself: ROW_BYTES_PER_CLOCK of its processor's clock
    LAUNCH_US                from the end of one kernel to the start of the next in a CUDA graph

Bandwidths, clocks, processors and rates are the vendors' figures. No GPU has confirmed a prediction yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dibit.kernels.triton.aot import Compiled
from dibit.kernels.triton.limits import MAX_WARPS, SHARED_BYTES, resident_programs

LAUNCH_US = 2.0
ROW_BYTES_PER_CLOCK = 32
"""Half of what a processor can take from the second-level cache."""
LANES = 128

WEIGHT_LOAD_BYTES = 16
ISSUE_SHARES = ((4, 0.6), (3, 0.6), (2, 0.8))
"""Bits, and the share of a GPU's instructions that the batch-1 product may take while memory is the limit."""
HELD_TO_SHARES = frozenset({"RTX 3060", "RTX A6000", "RTX 4090", "A100", "H100"})
RECORDED_SLACK = 0.1
RECORDED: Mapping[str, Mapping[int, float]] = {
    "qlinear int2-g128 M1": {86: 1.75, 89: 1.75, 80: 1.75, 90: 1.75, 100: 1.66, 120: 1.77},
    "qlinear int2-g128 M16": {86: 1.98, 89: 1.95, 80: 1.95, 90: 1.73, 100: 1.56, 120: 1.97},
    "qlinear int3-g128 M1": {86: 1.92, 89: 1.92, 80: 1.92, 90: 1.92, 100: 1.83, 120: 1.94},
    "qlinear int3-g128 M16": {86: 2.11, 89: 2.11, 80: 2.11, 90: 1.91, 100: 1.74, 120: 2.15},
    "qlinear int4-g128 M1": {86: 1.52, 89: 1.52, 80: 1.52, 90: 1.52, 100: 1.46, 120: 1.54},
    "qlinear int4-g128 M16": {86: 1.9, 89: 1.87, 80: 1.87, 90: 1.67, 100: 1.48, 120: 1.88},
    "qlinear int8-g128 M1": {86: 1.7, 89: 1.7, 80: 1.7, 90: 1.67, 100: 1.58, 120: 1.7},
    "qlinear int8-g128 M16": {86: 2.09, 89: 2.06, 80: 2.06, 90: 1.89, 100: 1.75, 120: 2.05},
    "qlinear int2-g128 a8 M64": {86: 4.34, 89: 4.28, 80: 4.28, 90: 4.5, 100: 3.61, 120: 4.34},
    "qlinear int2-channel a8 M64": {86: 1.81, 89: 1.81, 80: 1.81, 90: 1.75, 100: 1.84, 120: 1.86},
    "qlinear int3-g64 a8 M64": {86: 7.61, 89: 7.66, 120: 7.66},
    "qlinear int3-g128 a8 M64": {86: 4.7, 89: 4.7, 80: 4.7, 90: 4.34, 100: 3.95, 120: 4.83},
    "qlinear int3-channel a8 M64": {86: 2.26, 89: 2.26, 80: 2.26, 90: 2.04, 100: 2.26, 120: 2.27},
    "qlinear int4-g128 a8 M64": {86: 4.31, 89: 4.25, 80: 4.25, 90: 4.17, 100: 3.52, 120: 4.27},
    "qlinear int4-channel a8 M64": {86: 1.78, 89: 1.78, 80: 1.78, 90: 1.58, 100: 1.78, 120: 1.77},
}
"""Instructions a weight at the time of writing (Triton 3.7.1); a change for the worse is a fault."""


@dataclass(frozen=True)
class GpuModel:
    """A GPU as its vendor describes it."""

    name: str
    arch: int
    processors: int
    clock_ghz: float
    bandwidth_gb_s: float
    tensor_tflops: float
    integer_tops: float

    def row_us(self, row_bytes: float) -> float:
        """A launch whose programs read and write `row_bytes` each."""
        return LAUNCH_US + row_bytes / (ROW_BYTES_PER_CLOCK * self.clock_ghz * 1e3)

    def instructions_per_weight(self, bits_per_weight: float) -> float:
        """Lane instructions that the GPU can issue in the time in which a weight's bits arrive."""
        weights_per_s = self.bandwidth_gb_s * 1e9 * 8 / bits_per_weight
        return LANES * self.processors * self.clock_ghz * 1e9 / weights_per_s


GPUS = (
    GpuModel("RTX 3060", 86, 28, 1.78, 360, 25.6, 102),
    GpuModel("RTX A6000", 86, 84, 1.80, 768, 154.8, 309.7),
    GpuModel("RTX 4090", 89, 128, 2.52, 1008, 165.2, 660.6),
    GpuModel("A100", 80, 108, 1.41, 2039, 312, 624),
    GpuModel("H100", 90, 132, 1.83, 3350, 989, 1979),
    GpuModel("B200", 100, 148, 1.86, 8000, 2250, 4500),
    GpuModel("RTX 5090", 120, 170, 2.41, 1792, 209.5, 838),
)
ARCHS = tuple(sorted({gpu.arch for gpu in GPUS}))


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one GPU.

    spills               bytes a thread keeps outside its registers
    occupancy            warps that fit a processor at once, of those it can hold
    weight_load_bytes    narrowest load of weight words; None where there are no weights
    weight_conversions   changes of layout between a weight's load and its product
    instr_per_weight     lane instructions of the main loop for each weight; None where there are no weights
    instr_budget         what the GPU can issue while a weight arrives from memory
    bytes                moved by a launch
    minimum_bytes        of these, packed weights, inputs and outputs
    predicted_us         by the model above
    bandwidth_share      of the GPU's bandwidth, in the predicted time
    """

    kernel: str
    gpu: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    shared_limit: int
    occupancy: float
    weight_load_bytes: int | None
    weight_conversions: int
    instr_per_weight: float | None
    instr_budget: float | None
    bytes: int
    minimum_bytes: int
    predicted_us: float
    bandwidth_share: float


HEADER = (
    "kernel                      gpu         regs  spills  shared  warps  load  conv   i/w  budget      bytes"
    "  predicted  bandwidth"
)


def line(row: KernelReport) -> str:
    """A row of the table under HEADER."""

    def shown(value: float | None, width: int, digits: int = 0) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    return (
        f"{row.kernel:<27} {row.gpu:<10} {row.registers:>5} {row.spills:>7} {row.shared_bytes:>7} {row.occupancy:>6.0%}"
        f"{shown(row.weight_load_bytes, 6)}{row.weight_conversions:>6}{shown(row.instr_per_weight, 6, 2)}"
        f"{shown(row.instr_budget, 8, 2)}{row.bytes:>11}{row.predicted_us:>8.1f} us{row.bandwidth_share:>11.0%}"
    )


def faults(row: KernelReport) -> list[str]:
    """What a kernel must not do, each as a sentence; none when it is as it should be."""
    found = []
    name = f"{row.kernel} on {row.gpu} (sm_{row.arch})"
    if row.spills:
        found.append(f"{name}: {row.spills} bytes a thread do not fit its {row.registers} registers")
    if row.occupancy == 0:
        found.append(f"{name}: one program's {row.registers} registers a thread are more than a processor has")
    if row.shared_bytes > row.shared_limit:
        found.append(f"{name}: {row.shared_bytes} bytes of shared memory; {row.shared_limit} are there")
    if row.weight_load_bytes is not None and row.weight_load_bytes < WEIGHT_LOAD_BYTES:
        found.append(f"{name}: weights are loaded {row.weight_load_bytes} bytes at a time, not {WEIGHT_LOAD_BYTES}")
    if row.weight_conversions:
        found.append(f"{name}: {row.weight_conversions} changes of layout between a weight's load and its product")
    if row.instr_per_weight is not None and row.instr_budget is not None:
        share = row.instr_per_weight / row.instr_budget
        limit = next((most for bits, most in ISSUE_SHARES if row.kernel == f"qlinear int{bits}-g128 M1"), None)
        if limit is not None and row.gpu in HELD_TO_SHARES and share > limit:
            found.append(f"{name}: {share:.0%} of the GPU's instructions go to unpacking; at most {limit:.0%} should")
        recorded = RECORDED.get(row.kernel, {}).get(row.arch)
        if recorded is not None and row.instr_per_weight > recorded * (1 + RECORDED_SLACK):
            found.append(f"{name}: {row.instr_per_weight:.2f} instructions a weight; recorded: {recorded:.2f}")
    return found


def predicted(
    kernel: str,
    gpu: GpuModel,
    made: Compiled,
    *,
    warps: int,
    moved: int,
    minimum: int,
    instructions: float = 0.0,
    products: float = 0.0,
    integers: bool = False,
    weight_load_bytes: int | None = None,
    conversions: int = 0,
    per_weight: float | None = None,
    budget: float | None = None,
    row_bytes: float = 0.0,
) -> KernelReport:
    """The row of a compiled kernel whose launch moves `moved` bytes, issues `instructions` of a lane and multiplies
    `products` pairs, of `integers` or of float16; `row_bytes` where a program moves so many by itself."""
    rate = LANES * gpu.processors * gpu.clock_ghz * 1e3
    tensor_rate = gpu.integer_tops if integers else gpu.tensor_tflops
    times = (moved / (gpu.bandwidth_gb_s * 1e3), instructions / rate, 2 * products / (tensor_rate * 1e6))
    time_us = max(max(times) + LAUNCH_US, gpu.row_us(row_bytes))
    programs = resident_programs(
        registers=made.registers, shared_bytes=made.shared_bytes, warps=warps, arch=gpu.arch
    )  # fmt: skip
    return KernelReport(
        kernel=kernel,
        gpu=gpu.name,
        arch=gpu.arch,
        registers=made.registers,
        spills=made.spills,
        shared_bytes=made.shared_bytes,
        shared_limit=SHARED_BYTES[gpu.arch],
        occupancy=programs * warps / MAX_WARPS[gpu.arch],
        weight_load_bytes=weight_load_bytes,
        weight_conversions=conversions,
        instr_per_weight=per_weight,
        instr_budget=budget,
        bytes=moved,
        minimum_bytes=minimum,
        predicted_us=time_us,
        bandwidth_share=moved / (gpu.bandwidth_gb_s * 1e3) / time_us,
    )
