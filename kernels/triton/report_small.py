"""Attention and the small ops in the report: a decode step of one sequence of Llama-3-8B with 4096 keys, and a prefill.

hidden 4096, 32 query heads, 8 KV heads of 128, MLP 14336, vocabulary 128256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dibit.kernels.triton.aot import compile_kernel
from dibit.kernels.triton.attention import BLOCK_KEYS, STAGES, blocks
from dibit.kernels.triton.device.attention import attention_kernel, merge_kernel
from dibit.kernels.triton.device.sampling import draw_kernel, hold_kernel, tally_kernel, weigh_kernel
from dibit.kernels.triton.device.small import (
    block_argmax_kernel,
    embedding_kernel,
    norm_kernel,
    rope_kv_write_kernel,
    row_argmax_kernel,
    silu_mul_kernel,
)
from dibit.kernels.triton.limits import SPLIT_KEYS
from dibit.kernels.triton.report_model import GpuModel, KernelReport, predicted
from dibit.kernels.triton.sampling import BLOCK as DRAW_BLOCK
from dibit.kernels.triton.sampling import TALLIES, TILE
from dibit.kernels.triton.small import ARGMAX_BLOCK, BLOCK

HIDDEN, HEADS, KV_HEADS, D, MLP, VOCAB = 4096, 32, 8, 128, 14336, 128256
KEYS = 4096
PREFILL = 512
# Types of the cache, and what they are called.
NAMES = {"fp16": "fp16", "bf16": "bf16", "fp8": "fp8", "i8": "int8", "u8": "int4"}


def compiled_report(
    name: str,
    kernel: Any,
    gpu: GpuModel,
    *,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    moved: int,
    warps: int,
    stages: int = 3,
    products: float = 0.0,
    row_bytes: float = 0.0,
    multiples_of_16: tuple[str, ...] = (),
) -> KernelReport:
    """Compile `kernel` for `gpu` and predict a launch that moves `moved` bytes."""
    made = compile_kernel(
        kernel,
        types=types,
        constants=constants,
        arch=gpu.arch,
        warps=warps,
        stages=stages,
        multiples_of_16=multiples_of_16,
    )
    return predicted(name, gpu, made, warps=warps, moved=moved, minimum=moved, products=products, row_bytes=row_bytes)


@dataclass(frozen=True)
class CacheArguments:
    """Both sides of a KV cache as device/cache.py takes them. kind: fp32, fp16, bf16; fp8; i8 or u8 for codes."""

    kind: str

    @property
    def bits(self) -> int:
        return {"fp8": 8, "i8": 8, "u8": 4}.get(self.kind, 16)

    @property
    def has_grid(self) -> bool:
        return self.kind in ("i8", "u8")

    @property
    def row_bytes(self) -> int:
        """Of one head of one token, keys or values."""
        grid = {"i8": D // 32 * 2, "u8": D // 32 * 4}.get(self.kind, 0)
        return grid + (D * 4 if self.kind == "fp32" else D * self.bits // 8)

    @property
    def types(self) -> dict[str, str]:
        grids = dict.fromkeys(("k_grid", "v_grid"), "*fp16") if self.has_grid else {}
        return {**dict.fromkeys(("k_cache", "v_cache"), "*u8" if self.kind == "fp8" else f"*{self.kind}"), **grids}

    @property
    def constants(self) -> dict[str, Any]:
        grids: dict[str, Any] = {} if self.has_grid else dict.fromkeys(("k_grid", "v_grid"))
        width = D if self.bits == 16 else self.row_bytes
        return {**grids, "K_WIDTH": width, "V_WIDTH": width, "K_BITS": self.bits, "V_BITS": self.bits}


def _attention(gpu: GpuModel, name: str, *, tokens: int, cache: CacheArguments) -> KernelReport:
    splits = -(-KEYS // SPLIT_KEYS) if tokens == 1 else 1
    rows = blocks(HEADS // KV_HEADS, tokens, codes=cache.bits < 16)
    integers = ("HEADS", "KV_HEADS", "GROUP", "TABLE_STRIDE", "BLOCK_SIZE", "SPLITS", "SPLIT_KEYS", "D")
    keys = 2 * KV_HEADS * KEYS * cache.row_bytes
    results = tokens * HEADS * (D + 1) * 4 * splits
    return compiled_report(
        name,
        attention_kernel,
        gpu,
        types={
            "q": "*fp32",
            **cache.types,
            "cu_seqlens": "*i32",
            "seq_lens": "*i32",
            "block_tables": "*i32",
            "out": "*fp32",
            "weights": "*fp32",
            "scale": "fp32",
            **dict.fromkeys(integers, "i32"),
        },
        constants={
            **cache.constants,
            "PARTIAL": tokens == 1,
            "BLOCK_D": D,
            "BLOCK_Q": rows.tokens,
            "BLOCK_G": rows.heads,
            "BLOCK_N": BLOCK_KEYS,
        },
        moved=keys + tokens * HEADS * D * 4 + results,
        warps=rows.warps,
        stages=STAGES,
        products=2.0 * tokens * HEADS * D * KEYS,
        multiples_of_16=("BLOCK_SIZE", "D", "SPLIT_KEYS"),
    )


def decode_attention(gpu: GpuModel, *, kind: str) -> KernelReport:
    return _attention(gpu, f"attention decode {NAMES[kind]}", tokens=1, cache=CacheArguments(kind))


def prefill_attention(gpu: GpuModel, *, kind: str) -> KernelReport:
    name = f"attention prefill {PREFILL}" + ("" if kind == "fp16" else f" {NAMES[kind]}")
    return _attention(gpu, name, tokens=PREFILL, cache=CacheArguments(kind))


def merge(gpu: GpuModel) -> KernelReport:
    splits = -(-KEYS // SPLIT_KEYS)
    return compiled_report(
        "attention merge",
        merge_kernel,
        gpu,
        types={"partial": "*fp32", "weights": "*fp32", "out": "*fp32", "SPLITS": "i32", "D": "i32"},
        constants={"BLOCK_D": D},
        moved=HEADS * (splits * (D + 1) + D) * 4,
        warps=1,
        multiples_of_16=("D",),
    )


def norm(gpu: GpuModel) -> KernelReport:
    pointers = dict.fromkeys(("x", "residual", "weight", "y", "total"), "*fp32")
    return compiled_report(
        "add_rms_norm",
        norm_kernel,
        gpu,
        types={**pointers, "eps": "fp32", "K": "i32"},
        constants={"ADD": True, "BLOCK": HIDDEN},
        moved=5 * HIDDEN * 4,
        warps=8,
        multiples_of_16=("K",),
    )


def silu(gpu: GpuModel) -> KernelReport:
    return compiled_report(
        "silu_mul",
        silu_mul_kernel,
        gpu,
        types={"gate_up": "*fp32", "y": "*fp32", "COLUMNS": "i32"},
        constants={"BLOCK": BLOCK},
        moved=3 * MLP * 4,
        warps=4,
        multiples_of_16=("COLUMNS",),
    )


def rope(gpu: GpuModel, *, kind: str) -> KernelReport:
    heads = HEADS + 2 * KV_HEADS
    cache = CacheArguments(kind)
    return compiled_report(
        "rope_kv_write" + ("" if kind == "fp16" else f" {NAMES[kind]}"),
        rope_kv_write_kernel,
        gpu,
        types={
            "qkv": "*fp32",
            "positions": "*i64",
            "cos": "*fp32",
            "sin": "*fp32",
            **cache.types,
            "slots": "*i64",
            "q": "*fp32",
            **dict.fromkeys(("T", "HEADS", "KV_HEADS", "BLOCK_SIZE", "HALF", "D"), "i32"),
        },
        constants={
            **dict.fromkeys(("sums", "factors", "scales", "zeros", "bias")),
            "SPLITS": 1,
            "PARTIAL": False,
            "PER_CHANNEL": False,
            "ZERO_BASE": 0.0,
            "ZERO_STEP": 1.0,
            "BIAS": False,
            "BLOCK_D": D,
            **cache.constants,
        },
        moved=heads * D * 4 + HEADS * D * 4 + 2 * KV_HEADS * cache.row_bytes,
        warps=1,
        multiples_of_16=("BLOCK_SIZE", "HALF", "D"),
    )


def embedding(gpu: GpuModel) -> KernelReport:
    return compiled_report(
        "embedding int8-g64",
        embedding_kernel,
        gpu,
        types={
            "ids": "*i64",
            "codes": "*i16",
            "scales": "*fp16",
            "zeros": "*u8",
            "y": "*fp32",
            **dict.fromkeys(("N", "NP", "K", "UNITS", "GROUP"), "i32"),
        },
        constants={"BITS": 8, "ZERO_BASE": 0.0, "ZERO_STEP": 1.0, "BLOCK": BLOCK},
        moved=HIDDEN * (1 + 4) + HIDDEN // 64 * 3,
        warps=4,
        multiples_of_16=("NP", "K", "GROUP"),
    )


def argmax_blocks(gpu: GpuModel) -> KernelReport:
    return compiled_report(
        "argmax of blocks",
        block_argmax_kernel,
        gpu,
        types={"scores": "*fp32", "peaks": "*fp32", "places": "*i32", "V": "i32", "BLOCKS": "i32"},
        constants={"BLOCK": ARGMAX_BLOCK},
        moved=VOCAB * 4,
        warps=4,
        multiples_of_16=("V",),
    )


def argmax_row(gpu: GpuModel) -> KernelReport:
    blocks = -(-VOCAB // ARGMAX_BLOCK)
    return compiled_report(
        "argmax of a row",
        row_argmax_kernel,
        gpu,
        types={"block_peaks": "*fp32", "block_places": "*i32", "ids": "*i64", "peaks": "*fp32", "BLOCKS": "i32"},
        constants={"BLOCK": 32},
        moved=blocks * 8,
        warps=1,
    )


def _draw_report(
    gpu: GpuModel, name: str, kernel: Any, constants: Mapping[str, Any], moved: int, *others: str
) -> KernelReport:
    types = {
        "scores": "*fp32",
        "peaks": "*fp32",
        "settings": "*fp64",
        "weights": "*i32",
        **dict.fromkeys(("tallies", "entries", "block_sums", "best", "ids"), "*i64"),
        "block_ties": "*i32",
        **dict.fromkeys(("R", "V", "BLOCKS", "STEP"), "i32"),
    }
    return compiled_report(
        name,
        kernel,
        gpu,
        types={key: types[key] for key in (*others, "settings", "weights", "R", "V")},
        constants=constants,
        moved=moved,
        warps=4,
        multiples_of_16=("V",),
    )


def draw_weights(gpu: GpuModel) -> KernelReport:
    constants = {"BLOCK": DRAW_BLOCK, "TALLIES": TALLIES}
    return _draw_report(gpu, "draw: weights", weigh_kernel, constants, VOCAB * 8, "scores", "peaks", "tallies")


def draw_step(gpu: GpuModel, *, search: int) -> KernelReport:
    constants = {"SEARCH": search, "AFTER_TOP_K": False, "BLOCK": DRAW_BLOCK, "TILE": TILE}
    name = f"draw: a step of top_{'kp'[search]}"
    return _draw_report(gpu, name, tally_kernel, constants, VOCAB * 4, "tallies", "entries", "STEP")


def draw_blocks(gpu: GpuModel) -> KernelReport:
    constants = {"SEARCH": 1, "BLOCK": DRAW_BLOCK}
    others = ("tallies", "entries", "block_sums", "block_ties", "BLOCKS")
    return _draw_report(gpu, "draw: blocks", hold_kernel, constants, VOCAB * 4, *others)


def draw_token(gpu: GpuModel) -> KernelReport:
    constants = {"BLOCK": DRAW_BLOCK, "MOST_BLOCKS": 128}
    others = ("entries", "block_sums", "block_ties", "best", "ids", "BLOCKS")
    blocks = -(-VOCAB // DRAW_BLOCK)
    return _draw_report(gpu, "draw: the token", draw_kernel, constants, blocks * 12 + DRAW_BLOCK * 4, *others)


SMALL: tuple[Callable[[GpuModel], KernelReport], ...] = (
    *(partial(decode_attention, kind=kind) for kind in NAMES),
    *(partial(prefill_attention, kind=kind) for kind in ("fp16", "fp8", "i8", "u8")),
    merge,
    norm,
    silu,
    *(partial(rope, kind=kind) for kind in ("fp16", "fp8", "i8", "u8")),
    embedding,
    argmax_blocks,
    argmax_row,
    draw_weights,
    *(partial(draw_step, search=search) for search in (0, 1)),
    draw_blocks,
    draw_token,
)
