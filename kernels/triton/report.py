"""What the kernels are on every supported GPU, found without one: `dibit kernels report`.

The prediction of a launch is the largest of three times, and the launch itself:

    bytes / bandwidth        every byte of weights, scales, zero points, activations and outputs, once
    instructions / rate      weights * instructions per weight / (128 lanes * processors * clock)
    products / tensor rate   2 * tokens * rows * columns / the rate of float16 with float32 sums, padding included
    LAUNCH_US                from the end of one kernel to the start of the next in a CUDA graph

Bandwidths, clocks, processors and rates are the vendors' figures. No GPU has confirmed a prediction yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dibit.kernels.formats import PER_CHANNEL, Format
from dibit.kernels.triton import layout
from dibit.kernels.triton.aot import Compiled, compile_kernel, weight_conversions
from dibit.kernels.triton.device.prepare import prepare_kernel
from dibit.kernels.triton.device.qlinear import qlinear_kernel, reduce_kernel
from dibit.kernels.triton.plan import Gpu, Plan, plan

LAUNCH_US = 2.0
LANES = 128
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTER_FILE = 65536
MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SHAPE = (14336, 4096)
"""Rows and columns of the weight that is predicted: an up-projection of Llama-3-8B."""

WEIGHT_LOAD_BYTES = 16
ISSUE_SHARES = ((4, 0.6), (3, 0.6), (2, 0.8))
"""Bits, and the share of a GPU's instructions that the batch-1 product may take while memory is the limit."""
HELD_TO_SHARES = frozenset({"RTX 3060", "RTX A6000", "RTX 4090", "A100", "H100"})
RECORDED_SLACK = 0.1
RECORDED: dict[tuple[str, int], float] = {("qlinear int2-g128 M1", 80): 1.75}
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

    def instructions_per_weight(self, bits_per_weight: float) -> float:
        """Lane instructions that the GPU can issue in the time in which a weight's bits arrive."""
        weights_per_s = self.bandwidth_gb_s * 1e9 * 8 / bits_per_weight
        return LANES * self.processors * self.clock_ghz * 1e9 / weights_per_s


GPUS = (
    GpuModel("RTX 3060", 86, 28, 1.78, 360, 25.6),
    GpuModel("RTX A6000", 86, 84, 1.80, 768, 154.8),
    GpuModel("RTX 4090", 89, 128, 2.52, 1008, 165.2),
    GpuModel("A100", 80, 108, 1.41, 2039, 312),
    GpuModel("H100", 90, 132, 1.83, 3350, 989),
    GpuModel("B200", 100, 148, 1.86, 8000, 2250),
    GpuModel("RTX 5090", 120, 170, 2.41, 1792, 209.5),
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


@dataclass(frozen=True)
class Product:
    """A low-bit product of the report: `tokens` activations with a weight of SHAPE in `format`."""

    format: Format
    tokens: int

    @property
    def name(self) -> str:
        return f"qlinear {self.format.name} M{self.tokens}"

    def plan(self, gpu: GpuModel) -> Plan:
        return plan(self.geometry, SHAPE[0], self.tokens, gpu=Gpu(gpu.processors, gpu.arch))

    @property
    def geometry(self) -> layout.Geometry:
        return layout.Geometry.of(self.format, SHAPE[1])


PRODUCTS = (
    *(Product(Format(bits, 128), tokens) for bits in (2, 3, 4, 8) for tokens in (1, 16)),
    *(Product(Format(bits, group), 1) for bits in (2, 3, 4) for group in (32, 64, PER_CHANNEL)),
    *(Product(Format(bits, 128), tokens) for bits in (2, 3, 4) for tokens in (64, 256)),
)


def compile_product(product: Product, chosen: Plan, arch: int) -> Compiled:
    """The product's kernel as `chosen` would launch it."""
    geometry = product.geometry
    zero_base, zero_step = product.format.zero_line
    return compile_kernel(
        qlinear_kernel,
        types={
            "half": "*fp16",
            "sums": "*fp32",
            "factors": "*fp32",
            "codes": "*i16",
            "scales": "*fp16",
            "zeros": "*u8",
            "y": "*fp32",
            "M": "i32",
            "N": "i32",
            "MP": "i32",
            "NP": "i32",
            "KP": "i32",
            "STEPS": "i32",
            "RUN": "i32",
        },
        constants={
            "bias": None,
            "residual": None,
            "BITS": product.format.bits,
            "STEP_UNITS": geometry.step_units,
            "GROUPS_PER_STEP": geometry.groups_per_step,
            "PER_CHANNEL": product.format.group_size == PER_CHANNEL,
            "ZERO_BASE": zero_base,
            "ZERO_STEP": zero_step,
            "SPLITS": chosen.splits,
            "PARTIAL": chosen.partial,
            "BIAS": False,
            "RESIDUAL": False,
            "BN": chosen.block_rows,
            "BM": chosen.block_tokens,
            "ASM": True,
        },
        arch=arch,
        warps=chosen.warps,
        stages=chosen.stages,
        multiples_of_16=("NP", "KP", *(("MP",) if chosen.block_tokens % 16 == 0 else ())),
    )


def report_product(product: Product, gpu: GpuModel) -> KernelReport:
    """Compile a product for `gpu` and predict its time, of its own launch alone."""
    chosen, geometry = product.plan(gpu), product.geometry
    made = compile_product(product, chosen, gpu.arch)
    n, k = SHAPE
    passes = chosen.padded_tokens(product.tokens) // chosen.block_tokens
    per_weight = None
    if made.loop is not None:
        per_weight = made.loop.instructions * 32 * chosen.warps / (chosen.block_rows * geometry.step_columns)
    weight_bytes = layout.nbytes(product.format, n, k)
    inputs = product.tokens * k * 2 + geometry.groups * product.tokens * 4
    outputs = product.tokens * n * 4
    moved = weight_bytes + inputs + outputs * (chosen.splits if chosen.partial else 1)
    return _row(
        product.name,
        gpu,
        made,
        warps=chosen.warps,
        moved=moved,
        minimum=weight_bytes + inputs + outputs,
        instructions=0.0 if per_weight is None else per_weight * passes * n * geometry.columns,
        products=float(n * geometry.columns * chosen.padded_tokens(product.tokens)),
        weight_load_bytes=made.load_bytes.get("i16"),
        conversions=weight_conversions(made.ttgir, rows=chosen.block_rows, columns=geometry.step_units * 16),
        per_weight=per_weight,
        budget=gpu.instructions_per_weight(8 * weight_bytes / (n * k)),
    )


def report_prepare(gpu: GpuModel) -> KernelReport:
    k = SHAPE[1]
    made = compile_kernel(
        prepare_kernel,
        types={
            "x": "*fp32",
            "half": "*fp16",
            "sums": "*fp32",
            "factors": "*fp32",
            **dict.fromkeys(("M", "MP", "K", "KP", "GROUPS"), "i32"),
        },
        constants={"BITS": 4, "GROUP": 128, "BLOCK": 2048},
        arch=gpu.arch,
        warps=4,
        stages=3,
        multiples_of_16=("K", "KP"),
    )
    moved = 8 * k * 2 + k * 4 + 4 * (k // 128 + 1)
    return _row("prepare M1", gpu, made, warps=4, moved=moved, minimum=moved)


def report_reduce(gpu: GpuModel) -> KernelReport:
    product = Product(Format(4, 128), 1)
    splits = product.plan(gpu).splits
    made = compile_kernel(
        reduce_kernel,
        types={
            "partial": "*fp32",
            "sums": "*fp32",
            "factors": "*fp32",
            "scales": "*fp16",
            "zeros": "*u8",
            "y": "*fp32",
            "M": "i32",
            "N": "i32",
        },
        constants={
            "bias": None,
            "residual": None,
            "SPLITS": max(2, splits),
            "PER_CHANNEL": False,
            "ZERO_BASE": 0.0,
            "ZERO_STEP": 1.0,
            "BIAS": False,
            "RESIDUAL": False,
            "BLOCK": 256,
        },
        arch=gpu.arch,
        warps=4,
        stages=3,
        multiples_of_16=("N",),
    )
    moved = SHAPE[0] * 4 * (max(2, splits) + 1)
    return _row("reduce M1", gpu, made, warps=4, moved=moved, minimum=SHAPE[0] * 4)


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
        recorded = RECORDED.get((row.kernel, row.arch))
        if recorded is not None and row.instr_per_weight > recorded * (1 + RECORDED_SLACK):
            found.append(f"{name}: {row.instr_per_weight:.2f} instructions a weight; recorded: {recorded:.2f}")
    return found


OTHERS: tuple[Callable[[GpuModel], KernelReport], ...] = (report_prepare, report_reduce)


def kernel_reports(
    gpus: Sequence[GpuModel] = GPUS,
    *,
    products: Sequence[Product] = PRODUCTS,
    others: Sequence[Callable[[GpuModel], KernelReport]] = OTHERS,
) -> Iterator[KernelReport]:
    """Every kernel on every GPU, as each is compiled (a second or two, less once Triton has cached it)."""
    for gpu in gpus:
        for product in products:
            yield report_product(product, gpu)
        for other in others:
            yield other(gpu)


def _row(
    kernel: str,
    gpu: GpuModel,
    made: Compiled,
    *,
    warps: int,
    moved: int,
    minimum: int,
    instructions: float = 0.0,
    products: float = 0.0,
    weight_load_bytes: int | None = None,
    conversions: int = 0,
    per_weight: float | None = None,
    budget: float | None = None,
) -> KernelReport:
    rate = LANES * gpu.processors * gpu.clock_ghz * 1e3
    times = (moved / (gpu.bandwidth_gb_s * 1e3), instructions / rate, 2 * products / (gpu.tensor_tflops * 1e6))
    predicted = max(times) + LAUNCH_US
    # Registers are handed out to a warp in units of 256; a kilobyte of shared memory is the system's.
    by_registers = REGISTER_FILE // (-(-made.registers * 32 // 256) * 256 * warps)
    by_shared = (SHARED_LIMIT[gpu.arch] + 1024) // (made.shared_bytes + 1024)
    resident = min(by_registers, by_shared, MAX_WARPS[gpu.arch] // warps) * warps
    return KernelReport(
        kernel=kernel,
        gpu=gpu.name,
        arch=gpu.arch,
        registers=made.registers,
        spills=made.spills,
        shared_bytes=made.shared_bytes,
        shared_limit=SHARED_LIMIT[gpu.arch],
        occupancy=resident / MAX_WARPS[gpu.arch],
        weight_load_bytes=weight_load_bytes,
        weight_conversions=conversions,
        instr_per_weight=per_weight,
        instr_budget=budget,
        bytes=moved,
        minimum_bytes=minimum,
        predicted_us=predicted,
        bandwidth_share=moved / (gpu.bandwidth_gb_s * 1e3) / predicted,
    )
