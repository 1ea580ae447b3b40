"""The fused ops in the report: one token of Llama-3-8B, and rows of a hidden state twice as wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dibit.kernels.triton.attention import BLOCK_KEYS, STAGES, blocks
from dibit.kernels.triton.device.decode import decode_attention_kernel
from dibit.kernels.triton.device.fused import norm_prepare_kernel, silu_prepare_kernel
from dibit.kernels.triton.device.small import rope_kv_write_kernel
from dibit.kernels.triton.fused import row_warps
from dibit.kernels.triton.limits import SPLIT_KEYS
from dibit.kernels.triton.qlinear import prepare_block, qmax_of
from dibit.kernels.triton.report_model import LAUNCH_US, GpuModel, KernelReport
from dibit.kernels.triton.report_small import (
    HEADS,
    HIDDEN,
    KEYS,
    KV_HEADS,
    MLP,
    NAMES,
    CacheArguments,
    D,
    compiled_report,
)

SPLITS = 8
"""Runs of the product before: more than any plan makes of a 4096 x 4096 weight."""
WIDE_HIDDEN = 8192
ARRIVAL_US = 0.7
"""From a program's last store to what it does as the last to arrive: stores seen by all, an atomic addition, a load."""

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


def attended_us(gpu: GpuModel, *, splits: int, columns: int, group: int, runs: int) -> float:
    """What a launch of attention for one token spends before and after its keys: each program reads the runs of its
    heads, one joins the splits of a KV head's `group` heads, one prepares the row of all heads, of `columns`."""
    first = 4 * D * runs * (2 * group + 3)
    joining = 4 * D * group * (splits + 1) if splits > 1 else 0
    arrivals = 2 if splits > 1 else 1
    return gpu.row_us(first + joining + (4 + 4 + 2) * columns) - LAUNCH_US + arrivals * ARRIVAL_US


def decode_attended(gpu: GpuModel, *, kind: str, keys: int = KEYS) -> KernelReport:
    cache, splits, group = CacheArguments(kind), -(-keys // SPLIT_KEYS), HEADS // KV_HEADS
    cut = blocks(group, 1, codes=cache.bits < 16)
    integers = ("T", "MP", "KP", "GROUPS", "HEADS", "KV_HEADS", "GROUP_HEADS", "TABLE_STRIDE", "BLOCK_SIZE")
    apart = ("shares", "weights")
    made = compiled_report(
        f"decode attention {keys} {NAMES[kind]}",
        decode_attention_kernel,
        gpu,
        types={
            "qkv": "*fp32",
            **{f"qkv_{name}": "*fp32" for name in ("sums", "factors")},
            **{name: _OWED[name] for name in ("scales", "zeros")},
            "positions": "*i64",
            "cos": "*fp32",
            "sin": "*fp32",
            **cache.types,
            "slots": "*i64",
            "seq_lens": "*i32",
            "block_tables": "*i32",
            **(dict.fromkeys(apart, "*fp32") if splits > 1 else {}),
            "row": "*fp32",
            "arrivals": "*i32",
            **_STORED,
            "scale": "fp32",
            **dict.fromkeys((*integers, "TABLE_SPLITS", "SPLIT_KEYS", "HALF", "D"), "i32"),
        },
        constants={
            **_END,
            **_FORMAT,
            **cache.constants,
            **({} if splits > 1 else dict.fromkeys(apart)),
            "JOIN": splits > 1,
            "BLOCK_D": D,
            "BLOCK_Q": cut.tokens,
            "BLOCK_G": cut.heads,
            "BLOCK_N": BLOCK_KEYS,
            "BLOCK": prepare_block(HIDDEN),
        },
        moved=2 * KV_HEADS * keys * cache.row_bytes + (HEADS + 2 * KV_HEADS) * D * 4 * SPLITS + HEADS * D * 10,
        warps=cut.warps,
        stages=STAGES,
        products=2.0 * HEADS * D * keys,
        multiples_of_16=("KP", "BLOCK_SIZE", "SPLIT_KEYS", "HALF", "D"),
    )
    time_us = made.predicted_us + attended_us(gpu, splits=splits, columns=HIDDEN, group=group, runs=SPLITS)
    return replace(made, predicted_us=time_us, bandwidth_share=made.bandwidth_share * made.predicted_us / time_us)


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
    *(partial(decode_attended, kind=kind) for kind in NAMES),
    partial(decode_attended, kind="fp16", keys=SPLIT_KEYS),
    rope_of_runs,
)
