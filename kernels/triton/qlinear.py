"""The quantized linear on NVIDIA GPUs (device/qlinear.py has the arithmetic, layout.py the bytes).

Activations are rounded to float16 with one power of two per token, so an output differs from the reference by at most

    sum over k of |w| (2^-11 |x| + 2^-21 * 2^e)  +  float32 rounding of the sums,        max|x| < 2^(e + 15)

With `activation_bits` they are the integers that the reference rounds to, which float16 holds: sums below 2^24, those
of any group of 128, are exact, and only the scaling of groups and tokens rounds. Many tokens then meet most weights on
integer tensor cores (`takes_integers` in plan.py), which make the same bits.

A NaN or an infinity in a row of x makes the whole row of y NaN. Rows of y are the same bits for every M on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dibit.kernels.contract import Dims
from dibit.kernels.formats import PER_CHANNEL
from dibit.kernels.qlinear import check_activation_bits
from dibit.kernels.triton.availability import gpu_of
from dibit.kernels.triton.device.prepare import prepare_kernel
from dibit.kernels.triton.device.qlinear import qlinear_kernel, reduce_kernel
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.plan import Plan, plan, takes_integers
from dibit.kernels.triton.tuned_plans import tuned_for

ASM = not triton.knobs.runtime.interpret
"""Inline assembly on a GPU; the interpreter has none and runs the same in plain operations."""

MAX_REGISTERS = 255
"""Left to itself, ptxas stops at 96 registers for some small programs and spills two values."""

_REALS = (torch.float32, torch.float16, torch.bfloat16)
_REDUCE_BLOCK = 256


@dataclass(frozen=True)
class Prepared:
    """Activations of `tokens` tokens as device/prepare.py makes them; `half` is int8 for integer products."""

    half: Tensor
    sums: Tensor
    factors: Tensor
    tokens: int

    @classmethod
    def empty(cls, w: TritonQWeight, tokens: int, padded_tokens: int, *, integers: bool = False) -> Prepared:
        """Room for products with `w`."""
        geometry, device = w.geometry, w.codes.device
        dtype = torch.int8 if integers else torch.float16
        return cls(
            torch.empty(padded_tokens, geometry.columns, dtype=dtype, device=device),
            torch.empty(geometry.groups, padded_tokens, dtype=torch.float32, device=device),
            torch.empty(padded_tokens, dtype=torch.float32, device=device),
            tokens,
        )

    @property
    def integers(self) -> bool:
        return self.half.dtype == torch.int8


def qmax_of(activation_bits: int | None) -> int:
    """QMAX of device/prepare.py."""
    return 0 if activation_bits is None else (1 << (check_activation_bits(activation_bits) - 1)) - 1


def prepare_block(columns: int) -> int:
    """Columns of a row of `columns` that a program prepares at once."""
    block: int = triton.next_power_of_2(columns)
    return min(2048, max(256, block))


def prepare(
    x: Tensor, w: TritonQWeight, *, padded_tokens: int, activation_bits: int | None = None, integers: bool = False
) -> Prepared:
    """x [M, K] for products with `w` (or with any weight of its format and K)."""
    made, geometry = Prepared.empty(w, x.shape[0], padded_tokens, integers=integers), w.geometry
    prepare_kernel[(padded_tokens,)](
        x,
        made.half,
        made.sums,
        made.factors,
        made.tokens,
        padded_tokens,
        w.k,
        geometry.columns,
        geometry.groups,
        BITS=w.format.bits,
        GROUP=max(0, w.format.group_size),
        BLOCK=prepare_block(w.k),
        QMAX=qmax_of(activation_bits),
        num_warps=4,
    )
    return made


def qlinear(
    x: Tensor,
    w: TritonQWeight,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · dequantize(w)ᵀ + bias + residual, contract in qlinear.py.

    x         [M, K] float32, float16 or bfloat16, contiguous, on the device of `w`
    bias      [N] float, or None
    activation_bits  4, 6 or 8: x is rounded so, a row at a time; None: as the module docstring says
    residual  [M, N] dtype of x, or None; added in float32 before y is rounded
    out       [M, N] dtype of x to write into, or None
    """
    dims = Dims("qlinear", N=w.n, K=w.k)
    dims.check("x", x, "M K", _REALS)
    if bias is not None:
        dims.check("bias", bias, "N", _REALS)
    if residual is not None:
        dims.check("residual", residual, "M N", (x.dtype,))
    if out is not None:
        dims.check("out", out, "M N", (x.dtype,))
    y = torch.empty(x.shape[0], w.n, dtype=x.dtype, device=x.device) if out is None else out
    if x.shape[0] == 0:
        return y
    integers = integers_of(w, x.shape[0], activation_bits)
    chosen = plan_of(w, x.shape[0], integers=integers)
    padded = chosen.padded_tokens(x.shape[0])
    prepared = prepare(x, w, padded_tokens=padded, activation_bits=activation_bits, integers=integers)
    return multiply(prepared, w, chosen, y, bias=bias, residual=residual)


def integers_of(w: TritonQWeight, tokens: int, activation_bits: int | None) -> bool:
    """Whether such products with `w` are integer ones, on the GPU that holds it."""
    gpu = gpu_of(w.codes.device)
    return takes_integers(w.format, w.geometry, tokens, gpu=gpu, activation_bits=activation_bits)


def plan_of(w: TritonQWeight, tokens: int, *, integers: bool = False) -> Plan:
    """How a product of `tokens` tokens with `w` is cut, on the GPU that holds it."""
    gpu = gpu_of(w.codes.device)
    return plan(w.geometry, w.padded_rows, tokens, gpu=gpu, tuned=tuned_for(w), integers=integers)


@dataclass(frozen=True)
class Runs:
    """A product [tokens, n] whose columns may not be added up yet.

    target  y [tokens, n], or runs [splits, tokens, n] float32 when `plan.partial`: then scaling by token, and `bias`
            [n], are owed too
    """

    target: Tensor
    prepared: Prepared
    weight: TritonQWeight
    plan: Plan
    bias: Tensor | None

    @classmethod
    def empty(cls, x: Prepared, w: TritonQWeight, chosen: Plan, *, bias: Tensor | None) -> Runs:
        """Room for a product in float32."""
        shape = (chosen.splits, x.tokens, w.n) if chosen.partial else (x.tokens, w.n)
        return cls(torch.empty(shape, dtype=torch.float32, device=x.half.device), x, w, chosen, bias)


def operands_of(x: Tensor | Runs) -> tuple[Tensor | None, ...]:
    """The first arguments of `finished` on the device."""
    if isinstance(x, Tensor):
        return x, None, None, None, None, None
    return x.target, x.prepared.sums, x.prepared.factors, x.weight.scales, x.weight.zeros, x.bias


def constants_of(x: Tensor | Runs) -> dict[str, Any]:
    """The last arguments of `finished` on the device."""
    if isinstance(x, Tensor) or not x.plan.partial:
        # What a finished product was made of would only be another kernel to compile.
        names = {"SPLITS": 1, "PARTIAL": False, "PER_CHANNEL": False, "BIAS": False}
        return {**names, "ZERO_BASE": 0.0, "ZERO_STEP": 1.0}
    zero_base, zero_step = x.weight.format.zero_line
    return {
        "SPLITS": x.plan.splits,
        "PARTIAL": True,
        "PER_CHANNEL": x.weight.format.group_size == PER_CHANNEL,
        "BIAS": x.bias is not None,
        "ZERO_BASE": zero_base,
        "ZERO_STEP": zero_step,
    }


def multiply(
    x: Prepared, w: TritonQWeight, chosen: Plan, y: Tensor, *, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The product itself, by a given plan; writes and returns y [M, N]."""
    if chosen.partial:
        finish(launch_runs(x, w, chosen, bias=bias), y, residual=residual)
    else:
        launch(Runs(y, x, w, chosen, bias), residual=residual)
    return y


def launch_runs(x: Prepared, w: TritonQWeight, chosen: Plan, *, bias: Tensor | None) -> Runs:
    """One launch, whatever the plan."""
    runs = Runs.empty(x, w, chosen, bias=bias)
    launch(runs)
    return runs


def finish(runs: Runs, y: Tensor, *, residual: Tensor | None = None) -> None:
    """The sum of a partial product's runs, in y [M, N]."""
    m, w, x = runs.prepared.tokens, runs.weight, runs.prepared
    reduce_kernel[(triton.cdiv(w.n, _REDUCE_BLOCK), m)](
        runs.target,
        x.sums,
        x.factors,
        w.scales,
        w.zeros,
        runs.bias,
        residual,
        y,
        m,
        w.n,
        SPLITS=runs.plan.splits,
        PER_CHANNEL=w.format.group_size == PER_CHANNEL,
        ZERO_BASE=w.format.zero_line[0],
        ZERO_STEP=w.format.zero_line[1],
        BIAS=runs.bias is not None,
        RESIDUAL=residual is not None,
        BLOCK=_REDUCE_BLOCK,
        num_warps=4,
    )


def launch(runs: Runs, *, residual: Tensor | None = None) -> Any:
    """Computes a product into its target, `residual` [M, N] added where the plan is not partial. Returns what Triton
    made of the kernel; in the interpreter None."""
    x, w, chosen = runs.prepared, runs.weight, runs.plan
    m, geometry = x.tokens, w.geometry
    padded = x.half.shape[0]
    per_channel = w.format.group_size == PER_CHANNEL
    zero_base, zero_step = w.format.zero_line
    return qlinear_kernel[
        (w.padded_rows // chosen.block_rows, padded // chosen.block_tokens, chosen.splits if chosen.partial else 1)
    ](
        x.half,
        x.sums,
        x.factors,
        w.codes.view(torch.int8) if x.integers else w.codes,
        w.scales,
        w.zeros,
        runs.bias,
        residual,
        runs.target,
        m,
        w.n,
        padded,
        w.padded_rows,
        geometry.columns,
        geometry.steps,
        chosen.run,
        BITS=w.format.bits,
        STEP_UNITS=geometry.step_units,
        GROUPS_PER_STEP=geometry.groups_per_step,
        PER_CHANNEL=per_channel,
        ZERO_BASE=zero_base,
        ZERO_STEP=zero_step,
        SPLITS=chosen.splits,
        PARTIAL=chosen.partial,
        BIAS=runs.bias is not None,
        RESIDUAL=residual is not None,
        BN=chosen.block_rows,
        BM=chosen.block_tokens,
        ASM=ASM,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        maxnreg=MAX_REGISTERS,
    )
