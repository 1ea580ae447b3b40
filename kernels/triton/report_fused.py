"""The fused ops in the report: one token of Llama-3-8B, and rows of a hidden state twice as wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dibit.kernels.triton.device.fused import attended_prepare_kernel, norm_prepare_kernel, silu_prepare_kernel
from dibit.kernels.triton.device.small import rope_kv_write_kernel
from dibit.kernels.triton.fused import MAX_JOINED_COLUMNS, row_warps
from dibit.kernels.triton.qlinear import qmax_of
from dibit.kernels.triton.report_model import GpuModel, KernelReport
from dibit.kernels.triton.report_small import HEADS, HIDDEN, KV_HEADS, MLP, CacheArguments, D, compiled_report

SPLITS = 8
"""Runs of the product before: more than any plan makes of a 4096 x 4096 weight."""
WIDE_HIDDEN = 8192

_OWED = {"x": "*fp32", "x_sums": "*fp32", "x_factors": "*fp32", "scales": "*fp16", "zeros": "*u8"}
_STORED = {"half": "*fp16", "sums": "*fp32", "factors": "*fp32"}
_SIZES = dict.fromkeys(("M", "MP", "K", "KP", "GROUPS"), "i32")
_END = {
    "bias": None,
    "SPLITS": SPLITS,
    "PARTIAL": True,
    "PER_CHANNEL": False,
    "ZERO_BASE": 0.0,
    "ZERO_STEP": 1.0,
    "BIAS": False,
}
_FORMAT = {"BITS": 4, "GROUP": 128, "QMAX": 0}


def _row_report(
    name: str,
    kernel: Any,
    gpu: GpuModel,
    *,
    columns: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    row_bytes: int,
) -> KernelReport:
    block = 1 << (columns - 1).bit_length()
    return compiled_report(
        name,
        kernel,
        gpu,
        types={**types, **_STORED, **_SIZES},
        constants={**_FORMAT, **constants, "BLOCK": block},
        moved=row_bytes,
        row_bytes=row_bytes,
        warps=row_warps(block),
        stages=1,
        multiples_of_16=("K", "KP"),
    )


def norm_prepare(gpu: GpuModel, *, columns: int, activation_bits: int | None = None) -> KernelReport:
    rounded = "" if activation_bits is None else f" to {activation_bits} bits"
    return _row_report(
        f"norm_prepare {columns}{rounded}",
        norm_prepare_kernel,
        gpu,
        columns=columns,
        types={**_OWED, "residual": "*fp32", "weight": "*fp32", "eps": "fp32"},
        constants={**_END, "ADD": True, "QMAX": qmax_of(activation_bits)},
        row_bytes=columns * (4 * (SPLITS + 3) + 2),
    )


def silu_prepare(gpu: GpuModel, *, columns: int) -> KernelReport:
    return _row_report(
        f"silu_prepare {columns}",
        silu_prepare_kernel,
        gpu,
        columns=columns,
        types=_OWED,
        constants={**_END, "SPLITS": 2},
        row_bytes=columns * (8 * 2 + 2),
    )


def attended_prepare(gpu: GpuModel, *, columns: int) -> KernelReport:
    return _row_report(
        f"attended_prepare {columns}",
        attended_prepare_kernel,
        gpu,
        columns=columns,
        types={"x": "*fp32", "weights": "*fp32", "SPLITS": "i32", "D": "i32"},
        constants={"PARTIAL": columns <= MAX_JOINED_COLUMNS},
        row_bytes=columns * (4 * (SPLITS if columns <= MAX_JOINED_COLUMNS else 1) + 2),
    )


def rope_of_runs(gpu: GpuModel) -> KernelReport:
    heads, cache = HEADS + 2 * KV_HEADS, CacheArguments("fp16")
    return compiled_report(
        "rope_kv_write of runs",
        rope_kv_write_kernel,
        gpu,
        types={
            "qkv": "*fp32",
            "sums": "*fp32",
            "factors": "*fp32",
            "scales": "*fp16",
            "zeros": "*u8",
            "positions": "*i64",
            "cos": "*fp32",
            "sin": "*fp32",
            **cache.types,
            "slots": "*i64",
            "q": "*fp32",
            **dict.fromkeys(("T", "HEADS", "KV_HEADS", "BLOCK_SIZE", "HALF", "D"), "i32"),
        },
        constants={**_END, "BLOCK_D": D, **cache.constants},
        moved=heads * D * 4 * SPLITS + HEADS * D * 4 + 2 * KV_HEADS * cache.row_bytes,
        warps=1,
        multiples_of_16=("BLOCK_SIZE", "HALF", "D"),
    )


FUSED: tuple[Callable[[GpuModel], KernelReport], ...] = (
    partial(norm_prepare, columns=HIDDEN),
    partial(norm_prepare, columns=WIDE_HIDDEN),
    partial(norm_prepare, columns=HIDDEN, activation_bits=8),
    partial(silu_prepare, columns=MLP),
    partial(attended_prepare, columns=HIDDEN),
    partial(attended_prepare, columns=WIDE_HIDDEN),
    rope_of_runs,
)
