"""Every kernel compiled for every GPU of report_model.py, where the model and the rules are: `dibit kernels report`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dibit.kernels.formats import PER_CHANNEL, Format
from dibit.kernels.triton import layout
from dibit.kernels.triton.aot import Compiled, compile_kernel, load_bytes, weight_conversions
from dibit.kernels.triton.device.prepare import prepare_kernel
from dibit.kernels.triton.device.qlinear import qlinear_kernel, reduce_kernel
from dibit.kernels.triton.plan import Gpu, Plan, plan, takes_integers
from dibit.kernels.triton.report_fused import FUSED, attended_us
from dibit.kernels.triton.report_model import GPUS, LAUNCH_US, GpuModel, KernelReport, predicted
from dibit.kernels.triton.report_small import SMALL

SHAPE = (14336, 4096)
"""Rows and columns of the weight that is predicted: an up-projection of Llama-3-8B."""


@dataclass(frozen=True)
class Product:
    """A low-bit product of the report: `tokens` activations with a weight of `shape` [N, K] in `format`; what rounding
    to `activation_bits` changes of it."""

    format: Format
    tokens: int
    shape: tuple[int, int] = SHAPE
    activation_bits: int | None = None

    @property
    def name(self) -> str:
        rounded = "" if self.activation_bits is None else f" a{self.activation_bits}"
        return f"qlinear {self.format.name}{rounded} M{self.tokens}"

    def plan(self, gpu: GpuModel) -> Plan:
        known, integers = Gpu(gpu.processors, gpu.arch), self.integers(gpu.arch)
        return plan(self.geometry, self.padded_rows, self.tokens, gpu=known, integers=integers)

    def integers(self, arch: int) -> bool:
        gpu = Gpu(1, arch)
        return takes_integers(self.format, self.geometry, self.tokens, gpu=gpu, activation_bits=self.activation_bits)

    @property
    def padded_rows(self) -> int:
        return -(-self.shape[0] // layout.TILE_ROWS) * layout.TILE_ROWS

    @property
    def geometry(self) -> layout.Geometry:
        return layout.Geometry.of(self.format, self.shape[1])


PRODUCTS = (
    *(Product(Format(bits, 128), tokens) for bits in (2, 3, 4, 8) for tokens in (1, 16)),
    *(Product(Format(bits, group), 1) for bits in (2, 3, 4) for group in (32, 64, PER_CHANNEL)),
    *(Product(Format(bits, 128), tokens) for bits in (2, 3, 4) for tokens in (64, 256)),
    *(
        Product(weight, tokens, activation_bits=8)
        for weight in (
            *(Format(bits, group) for bits in (2, 3, 4) for group in (128, PER_CHANNEL)),
            Format(3, 64),
            Format(8, 128),
            Format(8, 64),
        )
        for tokens in (64, 256)
    ),
)


def compile_product(product: Product, chosen: Plan, arch: int) -> Compiled:
    """The product's kernel as `chosen` would launch it; shapes that are cut alike share one."""
    return _compiled(
        product.format,
        product.geometry.step_units,
        product.geometry.groups_per_step,
        replace(chosen, run=0),
        arch,
        integers=product.integers(arch),
    )


@functools.cache
def _compiled(
    format: Format, step_units: int, groups_per_step: int, chosen: Plan, arch: int, *, integers: bool
) -> Compiled:
    zero_base, zero_step = format.zero_line
    return compile_kernel(
        qlinear_kernel,
        types={
            "half": "*i8" if integers else "*fp16",
            "sums": "*fp32",
            "factors": "*fp32",
            "codes": "*i8" if integers else "*i16",
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
            "BITS": format.bits,
            "STEP_UNITS": step_units,
            "GROUPS_PER_STEP": groups_per_step,
            "PER_CHANNEL": format.group_size == PER_CHANNEL,
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
    n, k = product.shape
    columns = geometry.step_units * (32 if product.integers(gpu.arch) else 16)
    passes = chosen.padded_tokens(product.tokens) // chosen.block_tokens
    per_weight = None
    if made.loop is not None:
        per_weight = made.loop.instructions * 32 * chosen.warps / (chosen.block_rows * geometry.step_columns)
    weight_bytes = layout.nbytes(product.format, n, k)
    inputs = product.tokens * k * (1 if product.integers(gpu.arch) else 2) + geometry.groups * product.tokens * 4
    outputs = product.tokens * n * 4
    moved = weight_bytes + inputs + outputs * (chosen.splits if chosen.partial else 1)
    return predicted(
        product.name,
        gpu,
        made,
        warps=chosen.warps,
        moved=moved,
        minimum=weight_bytes + inputs + outputs,
        instructions=0.0 if per_weight is None else per_weight * passes * n * geometry.columns,
        products=float(n * geometry.columns * chosen.padded_tokens(product.tokens)),
        integers=product.integers(gpu.arch),
        weight_load_bytes=load_bytes(made.ttgir, rows=chosen.block_rows, columns=columns),
        conversions=weight_conversions(made.ttgir, rows=chosen.block_rows, columns=columns),
        per_weight=per_weight,
        budget=gpu.instructions_per_weight(8 * weight_bytes / (n * k)),
    )


def predicted_product_us(product: Product, gpu: GpuModel) -> float:
    """The prediction of a whole product: its own launch, the preparation before it, the sum of its runs after it."""
    row = report_product(product, gpu)
    launches = 2 if product.plan(gpu).partial else 1
    return row.predicted_us + launches * LAUNCH_US


@dataclass(frozen=True)
class DecodePrediction:
    """A decode step of one sequence of Llama-2-7B (short context, head at 8 bits), captured in a CUDA graph.

    launches         kernels of a step
    bandwidth_share  bytes of weights over the GPU's bandwidth, as a share of the step
    """

    gpu: str
    format: str
    launches: int
    step_us: float
    tok_s: float
    bandwidth_share: float


LLAMA_2_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
LAYERS = 32
HEAD = (32000, 4096)
LAYER_LAUNCHES = 8
"""Four products, and what is fused before each: kernels/triton/fused.py, decode.py."""
LAST_LAUNCHES = 4
"""Beside the head's own: embedding, final norm, two of argmax."""


def predict_decode(gpu: GpuModel, format: Format) -> DecodePrediction:
    """Products by their own predictions, rows of the fused ops by what they read, attention by all but its keys, the
    rest by its launch alone."""
    products = [Product(format, 1, shape) for shape in LLAMA_2_7B]
    head = Product(Format(8, 64), 1, HEAD)
    qkv, o, gate_up, down = ((product.plan(gpu).splits, product.shape) for product in products)
    hidden, mlp = qkv[1][1], down[1][1]
    # Runs, the residual twice, the norm's weight, and what is stored in float16.
    rows = (
        4 * hidden * (down[0] + 3) + 2 * hidden,
        4 * hidden * (o[0] + 3) + 2 * hidden,
        8 * mlp * gate_up[0] + 2 * mlp,
    )
    layer_us = sum(report_product(product, gpu).predicted_us for product in products)
    layer_us += sum(map(gpu.row_us, rows))
    layer_us += LAUNCH_US + attended_us(gpu, splits=1, columns=hidden, group=1, runs=qkv[0])
    # The last block's product is finished by itself, as is the head's.
    ends = LAST_LAUNCHES + sum(1 for product in (products[-1], head) if product.plan(gpu).partial) + 2
    head_us = report_product(head, gpu).predicted_us + (ends - 1) * LAUNCH_US
    step_us = LAYERS * layer_us + head_us
    weights = LAYERS * sum(layout.nbytes(format, *shape) for shape in LLAMA_2_7B) + layout.nbytes(head.format, *HEAD)
    share = weights / (gpu.bandwidth_gb_s * 1e3) / step_us
    return DecodePrediction(gpu.name, format.name, LAYERS * LAYER_LAUNCHES + ends, step_us, 1e6 / step_us, share)


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
        constants={"BITS": 4, "GROUP": 128, "BLOCK": 2048, "QMAX": 0},
        arch=gpu.arch,
        warps=4,
        stages=3,
        multiples_of_16=("K", "KP"),
    )
    moved = 8 * k * 2 + k * 4 + 4 * (k // 128 + 1)
    return predicted("prepare M1", gpu, made, warps=4, moved=moved, minimum=moved)


def report_reduce(gpu: GpuModel) -> KernelReport:
    product = Product(Format(4, 128), 1)
    splits = product.plan(gpu).splits
    made = compile_kernel(
        reduce_kernel,
        types={
            "runs": "*fp32",
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
    return predicted("reduce M1", gpu, made, warps=4, moved=moved, minimum=SHAPE[0] * 4)


OTHERS: tuple[Callable[[GpuModel], KernelReport], ...] = (report_prepare, report_reduce, *FUSED, *SMALL)


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
