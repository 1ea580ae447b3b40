"""What `dibit inspect` tells about a checkpoint: sizes, formats per kind of layer, how it will be read, and why."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.checkpoint import Checkpoint, ZeroChoice

_LINEAR = re.compile(r".*\.layers\.(\d+)\.(?:.+\.)?([^.]+_proj)")
_BLOCKS_IN_A_GROUP = 10


@dataclass(frozen=True)
class TypeSize:
    """Tensors of one type on disk."""

    stored: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class SiteFormat:
    """Linears of one kind that share a format ("q_proj", "int4-g64")."""

    site: str
    format: str
    modules: int


@dataclass(frozen=True)
class CheckpointSummary:
    """
    parameters       weights of the model, a tied head counted once
    bits_per_weight  stored bits of a linear's weight on average, scales and zero points included
    block_widths     for every block, the widths of its packed linears, each once; empty for one in float
    quantization     declared method and format; None for a model in float (or in GGUF blocks)
    activation_bits  width to which the inputs of quantized linears are rounded when it is served; None: weights only
    zero_convention  how zero points are read, with the reason beside it
    """

    name: str
    path: str
    architecture: str
    layers: int | None
    context_length: int | None
    parameters: int
    file_bytes: int
    bits_per_weight: float
    types: tuple[TypeSize, ...]
    sites: tuple[SiteFormat, ...]
    block_widths: tuple[tuple[int, ...], ...]
    quantization: str | None
    quantizer: str | None
    activation_bits: int | None
    zero_convention: str | None
    zero_reason: str | None
    tokenizer: bool
    chat_template: bool

    def text(self) -> str:
        """The summary for a person."""
        lines = [
            f"{self.name}  ({self.path})",
            f"architecture    {self.architecture}, {self.layers} layers, context {self.context_length}",
            f"parameters      {self.parameters / 1e6:.1f} M in {self.file_bytes / 1e6:.1f} MB",
            f"linears         {self.bits_per_weight:.2f} bits per weight",
            f"quantization    {self.quantization or 'none'}" + (f", by {self.quantizer}" if self.quantizer else ""),
        ]
        if self.activation_bits is not None:
            lines.append(f"activations     {self.activation_bits} bits, one scale per token")
        if self.zero_convention:
            lines.append(f"zero points     {self.zero_convention}: {self.zero_reason}")
        lines.append(f"tokenizer       {_yes(self.tokenizer)}, chat template {_yes(self.chat_template)}")
        lines.extend(f"  {t.stored:<8} {t.tensors:>5} tensors {t.nbytes / 1e6:>10.2f} MB" for t in self.types)
        lines.extend(_block_lines(self.block_widths))
        formats: dict[str, list[str]] = defaultdict(list)
        for site in self.sites:
            formats[site.site].append(f"{site.format} x {site.modules}")
        lines.extend(f"  {site:<12} {', '.join(found)}" for site, found in formats.items())
        return "\n".join(lines)


def _block_lines(widths: tuple[tuple[int, ...], ...]) -> list[str]:
    """A histogram and a map, when blocks differ: nothing to see otherwise."""
    if len(set(widths)) <= 1 and all(len(own) <= 1 for own in widths):
        return []
    names = ["+".join(map(str, own)) or "float" for own in widths]
    counts = Counter(names)
    histogram = ", ".join(f"{counts[name]} x {name}" for name in sorted(counts))
    marks = "".join("f" if not own else str(own[0]) if len(own) == 1 else "*" for own in widths)
    pieces = [marks[i : i + _BLOCKS_IN_A_GROUP] for i in range(0, len(marks), _BLOCKS_IN_A_GROUP)]
    legend = "".join(
        f"; {mark} {meaning}" for mark, meaning in (("*", "several widths"), ("f", "float")) if mark in marks
    )
    return [f"blocks by bits  {histogram}", f"bits of blocks  {' '.join(pieces)}  (first to last{legend})"]


def inspect_checkpoint(path: Path | str, *, gptq_zero: ZeroChoice = "auto") -> CheckpointSummary:
    """Facts of the checkpoint at `path`, from headers and, for the zero convention, a few packed linears.

    Raises CheckpointError when it cannot be opened.
    """
    checkpoint = open_checkpoint(path, gptq_zero=gptq_zero)
    try:
        return _summary(checkpoint)
    finally:
        checkpoint.close()


def _summary(checkpoint: Checkpoint) -> CheckpointSummary:
    quantization, decision = checkpoint.quantization, checkpoint.zero_decision()
    architectures = checkpoint.config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    return CheckpointSummary(
        name=checkpoint.name,
        path=str(checkpoint.path),
        architecture=str(architecture or checkpoint.config.get("model_type") or "unknown"),
        layers=_whole(checkpoint.config.get("num_hidden_layers")),
        context_length=_whole(checkpoint.config.get("max_position_embeddings")),
        parameters=_parameters(checkpoint),
        file_bytes=checkpoint.packed_bytes() + checkpoint.float_bytes(),
        bits_per_weight=_bits_per_weight(checkpoint),
        types=_types(checkpoint),
        sites=_sites(checkpoint),
        block_widths=_block_widths(checkpoint),
        quantization=None
        if quantization is None
        else f"{quantization.method} {quantization.format.name}, "
        f"{'symmetric' if quantization.symmetric else 'asymmetric'}, labelled {quantization.checkpoint_format}",
        quantizer=None if quantization is None else quantization.quantizer,
        activation_bits=None if quantization is None else quantization.activation_bits,
        zero_convention=None if decision is None else decision.convention,
        zero_reason=None if decision is None else decision.reason,
        tokenizer=checkpoint.has_tokenizer(),
        chat_template=checkpoint.has_chat_template(),
    )


def _floats(checkpoint: Checkpoint) -> list[str]:
    packed = {name for linear in checkpoint.packed().values() for name in linear.tensors}
    return [name for name in checkpoint.names() if name not in packed]


def _parameters(checkpoint: Checkpoint) -> int:
    packed = sum(linear.shape[0] * linear.shape[1] for linear in checkpoint.packed().values())
    return packed + sum(checkpoint.info(name).numel for name in _floats(checkpoint))


def _linears(checkpoint: Checkpoint) -> list[tuple[int, str, str]]:
    """(layer, site, module) of every linear of the layers, in file order."""
    names = [name.removesuffix(".weight") for name in _floats(checkpoint) if name.endswith(".weight")]
    found = ((_LINEAR.fullmatch(module), module) for module in [*names, *checkpoint.packed()])
    return [(int(match[1]), match[2], module) for match, module in found if match]


def _bits_per_weight(checkpoint: Checkpoint) -> float:
    """Group indices are not counted: they say nothing."""
    bits = weights = 0
    packed = checkpoint.packed()
    for _, _, module in _linears(checkpoint):
        linear = packed.get(module)
        names = [f"{module}.weight"] if linear is None else [n for n in linear.tensors if not n.endswith("g_idx")]
        bits += 8 * sum(checkpoint.info(name).nbytes for name in names)
        weights += checkpoint.info(f"{module}.weight").numel if linear is None else linear.shape[0] * linear.shape[1]
    return bits / weights if weights else 0.0


def _types(checkpoint: Checkpoint) -> tuple[TypeSize, ...]:
    sizes: dict[str, list[int]] = defaultdict(list)
    for name in checkpoint.names():
        info = checkpoint.info(name)
        sizes[info.stored].append(info.nbytes)
    return tuple(TypeSize(stored, len(sizes[stored]), sum(sizes[stored])) for stored in sorted(sizes))


def _sites(checkpoint: Checkpoint) -> tuple[SiteFormat, ...]:
    count: Counter[tuple[str, str]] = Counter()
    for _, site, module in _linears(checkpoint):
        packed = checkpoint.linear_format(module)
        count[site, packed.name if packed else checkpoint.info(f"{module}.weight").stored] += 1
    return tuple(SiteFormat(site, kind, modules) for (site, kind), modules in sorted(count.items()))


def _block_widths(checkpoint: Checkpoint) -> tuple[tuple[int, ...], ...]:
    found: dict[int, set[int]] = defaultdict(set)
    for layer, _, module in _linears(checkpoint):
        packed = checkpoint.linear_format(module)
        found[layer].update(() if packed is None else (packed.bits,))
    return tuple(tuple(sorted(found[layer])) for layer in sorted(found))


def _whole(value: object) -> int | None:
    return value if type(value) is int else None


def _yes(value: bool) -> str:  # noqa: FBT001
    return "yes" if value else "no"
