"""What quantizers are compared by: bits that are stored, perplexity window by window, and a table of both."""

from __future__ import annotations

import math
import re
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import gguf

from dibit.bench.machine import MachineFacts
from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import ConfigError

_PREFIXES = (16, 32)
# "[ 3/272] blk.0.attn_k.weight - [ 576, 192, 1, 1], type = f16, converting to q4_0 .. size = ..."
_QUANTIZED = re.compile(r"\] (blk\.\S+) +- \[ *(\d+), +(\d+),[^\]]*\], type = +(\w+), (?:converting to (\w+) |size = )")
# Weights of a block, and its bytes.
_NEW_TYPES = {"Q2_0": (64, 18)}


@dataclass(frozen=True)
class Made:
    """How a checkpoint came to be.

    seconds          of the tool's own work: loading, quantizing, saving
    process_seconds  with the imports, and peak memory of the process
    """

    versions: dict[str, str]
    settings: dict[str, str | int | float | bool]
    seconds: float
    process_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Record:
    """One work's result.

    bits_per_weight  of the linears of blocks, scales and zero points included
    types            share of these weights by the format they are stored in
    ppl              on the first 16, 32, ... windows, "all" of the `windows` that were measured
    measured_as      "served" or "float32"
    """

    tool: str
    what: str
    made: Made
    bits_per_weight: float
    types: dict[str, float]
    ppl: dict[str, float]
    windows: int
    context: int
    measured_as: str
    calibration: dict[str, str | int] = field(default_factory=dict)
    machine: MachineFacts | None = None


def perplexities(losses: list[float]) -> dict[str, float]:
    """By number of first windows, of the mean loss of each."""
    counts = {str(count): count for count in _PREFIXES if count < len(losses)} | {"all": len(losses)}
    return {name: math.exp(math.fsum(losses[:count]) / count) for name, count in counts.items()}


def packed_bits(checkpoint_dir: Path) -> tuple[float, dict[str, float]]:
    """Bits per weight and share of each format, of the packed linears. Raises ConfigError when some are not packed."""
    with closing(open_checkpoint(checkpoint_dir)) as checkpoint:
        packed = checkpoint.packed()
        floats = [
            name
            for name in checkpoint.names()
            if name.endswith("_proj.weight") and name.removesuffix(".weight") not in packed
        ]
        if floats or not packed:
            raise ConfigError(f"{checkpoint_dir} has linears that are not quantized: {', '.join(floats[:3])}")
        counts: dict[str, int] = {}
        bits = 0.0
        for linear in packed.values():
            n, k = linear.shape
            counts[linear.format.name] = counts.get(linear.format.name, 0) + n * k
            bits += n * k * linear.format.bits_per_weight(k)
    return _shared(bits, counts)


def gguf_bits(log: str) -> tuple[float, dict[str, float]]:
    """The same of a GGUF file's matrices in blocks, from what llama-quantize wrote when it made the file.

    Not from the file, as llama.cpp has types that the gguf package does not know.
    """
    counts: dict[str, int] = {}
    bits = 0.0
    for name, k, n, kept, converted in _QUANTIZED.findall(log):
        weights, kind = int(n) * int(k), (converted or kept).upper()
        if int(n) > 1:
            block, block_bytes = _NEW_TYPES.get(kind) or gguf.GGML_QUANT_SIZES[_gguf_type(kind, name)]
            counts[kind] = counts.get(kind, 0) + weights
            bits += weights / block * block_bytes * 8
    if not counts:
        raise ConfigError("llama-quantize said nothing of any matrix; its output has another form than is known here")
    return _shared(bits, counts)


def _gguf_type(kind: str, name: str) -> gguf.GGMLQuantizationType:
    try:
        return gguf.GGMLQuantizationType[kind]
    except KeyError:
        raise ConfigError(f"{name} is stored as {kind}, whose size is not known here") from None


def _shared(bits: float, counts: dict[str, int]) -> tuple[float, dict[str, float]]:
    total = sum(counts.values())
    return bits / total, {name: count / total for name, count in sorted(counts.items())}


def table(records: list[Record]) -> str:
    """Markdown, the lowest perplexity of each width first."""
    counts = [name for name in ("16", "32", "all") if any(name in one.ppl for one in records)]
    heads = " | ".join(f"ppl, {name} windows" for name in counts)
    lines = [
        f"| tool | | bits per weight | stored as | {heads} | minutes | peak GB |",
        "| --- " * (6 + len(counts)) + "|",
    ]
    for one in sorted(records, key=lambda found: (round(found.bits_per_weight), found.ppl["all"])):
        version = next(iter(one.made.versions.values()))
        types = ", ".join(f"{share:.0%} {name}" for name, share in one.types.items())
        figures = " | ".join(f"{one.ppl[name]:.4g}" if name in one.ppl else "" for name in counts)
        lines.append(
            f"| {one.tool} {version} | {one.what} | {one.bits_per_weight:.2f} | {types} | {figures} | "
            f"{one.made.seconds / 60:.1f} | {one.made.peak_rss_bytes / 1e9:.2f} |"
        )
    return "\n".join(lines)
