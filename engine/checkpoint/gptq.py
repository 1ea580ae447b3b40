"""GPTQ's packed tensors to and from QTensor, bit for bit.

For a linear of N outputs and K inputs in groups of G:

    qweight  int32 [K * bits / 32, N]    codes, packed along K
    qzeros   int32 [K / G, N * bits / 32]  zero fields, packed along N
    scales   float [K / G, N]
    g_idx    int32 [K]                   group of each input; only k // G is supported (no act-order)

Fields follow the bit stream of kernels/formats.py. Version 1 of the format stores z - 1 in a zero field, version 2
stores z. A version 1 field that is all ones would mean z = 2^bits, which no quantizer chooses: it is a z of 0 that
overflowed. GPTQModel subtracts 1 from every field by whole words, borrow included, so adding it back by whole words is
exact; from any other tool such a field is refused, as it may have spilled into its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import TensorInfo, ZeroConvention
from dibit.engine.checkpoint.export_config import quantization_config
from dibit.engine.checkpoint.packing import (
    SAMPLED_ROWS,
    CannotHold,
    Facts,
    Headers,
    Sample,
    check_codes,
    check_grid,
    compact_scales,
    finite_scales,
)
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.safetensors_file import FLOAT_TYPES
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, FormatError, QTensor, pack_stream, unpack_stream

PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORDWISE_TOOL = "gptqmodel"
_ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GptqTensors:
    """The packed tensors of one linear; g_idx may be absent (k // G is meant)."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None

    def named(self, module: str) -> dict[str, Tensor]:
        """The tensors by their names in the file; of "", by the last word of these."""
        parts = {part: getattr(self, part) for part in PARTS}
        prefix = f"{module}." if module else ""
        return {f"{prefix}{part}": tensor for part, tensor in parts.items() if tensor is not None}


def check_shapes(module: str, parts: Mapping[str, TensorInfo], declared: Format | None, source: str) -> None:
    """Compare the headers of a packed module with its declared format. Raises CheckpointError.

    parts  header of each of PARTS that the file has
    """
    missing = [part for part in PARTS[:3] if part not in parts]
    if missing:
        raise CheckpointError(
            f"{source}: {module} is packed but has no {', '.join(missing)}; the checkpoint is damaged"
        )
    if declared is None:
        raise CheckpointError(f"{source}: {module} is packed, but `dynamic` of its config declares it float")
    for part, info in parts.items():
        wanted = FLOAT_TYPES if part == "scales" else (torch.int32, torch.int64) if part == "g_idx" else (torch.int32,)
        rank = 1 if part == "g_idx" else 2
        if info.dtype not in wanted or len(info.shape) != rank:
            raise CheckpointError(
                f"{source}: {module}.{part} is {info.stored} {list(info.shape)}; expected "
                f"{' or '.join(str(t).removeprefix('torch.') for t in wanted)} with {rank} dimension(s)"
            )
    (words, n), (groups, zero_words) = parts["qweight"].shape, parts["qzeros"].shape
    shapes = ", ".join(f"{part} {list(info.shape)}" for part, info in parts.items())
    if tuple(parts["scales"].shape) != (groups, n) or n == 0 or words == 0:
        raise CheckpointError(f"{source}: {module} has shapes that do not belong together: {shapes}")
    bits = zero_words * 32 / n
    if bits != declared.bits:
        raise CheckpointError(
            f"{source}: {module} is declared {declared.bits}-bit, but its shapes ({shapes}) imply {bits:g} bits; "
            "correct the config or name the module in `dynamic`"
        )
    k, rest = divmod(words * 32, declared.bits)
    if rest or ("g_idx" in parts and parts["g_idx"].shape[0] != k):
        raise CheckpointError(
            f"{source}: {module} has shapes that do not belong together at {declared.bits} bits: {shapes}; "
            "padded or differently packed rows are not supported"
        )
    try:
        expected = declared.groups(k)
    except FormatError as error:
        raise CheckpointError(f"{source}: {module}: {error}") from error
    if expected != groups:
        implied = f"{k // groups}" if groups and k % groups == 0 else f"no whole number ({k} inputs in {groups} groups)"
        raise CheckpointError(
            f"{source}: {module} is declared {declared.name}, but its shapes ({shapes}) imply a group size of "
            f"{implied}; correct the config"
        )


def check_order(module: str, g_idx: Tensor, format: Format, source: str) -> None:
    """Refuse act-order: a g_idx other than k // G. Raises CheckpointError."""
    k = g_idx.shape[0]
    if not torch.equal(g_idx.long(), torch.arange(k) // format.columns_per_group(k)):
        raise CheckpointError(
            f"{source}: {module} was quantized with act-order (desc_act: its g_idx is not k // group_size), which is "
            "not supported; quantize the float model again without it (desc_act false)"
        )


def from_gptq(
    tensors: GptqTensors,
    format: Format,
    *,
    zeros: ZeroConvention,
    wordwise: bool = False,
    module: str = "linear",
    source: str = "checkpoint",
) -> QTensor:
    """Unpack one linear, whose shapes have been checked.

    wordwise  version 1 zeros were written by whole-word subtraction (GPTQModel)
    returns   QTensor [N, K]; float16 scales as stored, float32 and bfloat16 ones as float32
    Raises CheckpointError on act-order, an overflowed zero field, or scales that are not finite.
    """
    if tensors.g_idx is not None:
        check_order(module, tensors.g_idx, format, source)
    scales = finite_scales(tensors.scales, module=module, source=source)
    fields = _zero_points(tensors.qzeros, format, zeros, wordwise=wordwise, what=f"{source}: {module}.qzeros")
    return QTensor(
        codes=unpack_stream(tensors.qweight.T.contiguous(), format.bits),
        zeros=fields.T.contiguous(),
        scales=scales.T.contiguous(),
        format=format,
    )


def to_gptq(q: QTensor, *, zeros: ZeroConvention = "v2", module: str = "linear") -> GptqTensors:
    """Pack one linear.

    Scales that float16 holds exactly are stored so, others as float32. Raises CheckpointError when N or K does not
    fill whole words, a code or zero point exceeds its field, or version 1 is asked for and a zero point is 0.
    """
    n, k = q.shape
    bits = q.format.bits
    check_words(q.format, n, k, module=module)
    check_codes(q, module=module, label="the GPTQ format")
    fields = q.zeros
    if zeros == "v1":
        if int(fields.min()) == 0:
            raise CannotHold(
                f"{module} has zero points of 0, which checkpoint_format gptq (version 1) cannot hold; write gptq_v2"
            )
        fields = fields - 1
    return GptqTensors(
        qweight=pack_stream(q.codes, bits).T.contiguous(),
        qzeros=pack_stream(fields.T.contiguous(), bits),
        scales=compact_scales(q.scales).T.contiguous(),
        g_idx=(torch.arange(k) // q.format.columns_per_group(k)).to(torch.int32),
    )


@dataclass(frozen=True)
class GptqPacking:
    """See packing.Packing and packing.Export.

    zeros     convention in which it writes
    wordwise  version 1 zeros were written by whole-word subtraction (GPTQModel)
    """

    zeros: ZeroConvention = "v2"
    wordwise: bool = False
    parts: ClassVar[tuple[str, ...]] = PARTS
    side_file: ClassVar[str | None] = "quantize_config.json"

    @property
    def label(self) -> str:
        return "gptq" if self.zeros == "v2" else "gptq-v1"

    def shape(self, headers: Headers) -> tuple[int, int]:
        check_shapes(headers.module, headers.parts, headers.declared, headers.source)
        assert headers.declared is not None
        words, n = headers.parts["qweight"].shape
        return n, words * 32 // headers.declared.bits

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        return from_gptq(
            GptqTensors(**tensors), format, zeros=zeros, wordwise=self.wordwise, module=module, source=source
        )

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> Sample:
        codes = unpack_stream(tensors["qweight"][:, :SAMPLED_ROWS].T.contiguous(), format.bits)
        return Sample(codes, unpack_stream(tensors["qzeros"], format.bits).T, format)

    def check(self, format: Format, n: int, k: int, *, module: str) -> None:
        check_grid(format, module=module, label=self.label)
        check_words(format, n, k, module=module)

    def pack(self, q: QTensor, *, module: str) -> dict[str, Tensor]:
        check_grid(q.format, module=module, label=self.label)
        return to_gptq(q, zeros=self.zeros, module=module).named("")

    def config(
        self, modules: Mapping[str, PackedModule], names: Iterable[str], *, method: str | None, facts: Facts
    ) -> dict[str, Any]:
        label = "gptq_v2" if self.zeros == "v2" else "gptq"
        return quantization_config(modules, names, method=method, facts=facts) | {"checkpoint_format": label}


def check_words(format: Format, n: int, k: int, *, module: str) -> None:
    """Raises CannotHold where the fields of a row or column do not fill whole words."""
    for letter, size in (("N", n), ("K", k)):
        if size * format.bits % 32:
            raise CannotHold(
                f"{module} has {letter} = {size}: {size} fields of {format.bits} bits do not fill whole 32-bit words, "
                f"which the GPTQ format needs; keep this layer in float or use a width for which {letter} * bits is a "
                "multiple of 32"
            )


def _zero_points(qzeros: Tensor, format: Format, zeros: ZeroConvention, *, wordwise: bool, what: str) -> Tensor:
    if zeros == "v2":
        return unpack_stream(qzeros, format.bits)
    if wordwise and format.bits in _ONE_IN_EVERY_FIELD:
        # Wraps modulo 2^32 as the tool's own subtraction did.
        words = (qzeros.long() + _ONE_IN_EVERY_FIELD[format.bits]) & 0xFFFFFFFF
        words = torch.where(words >= 1 << 31, words - (1 << 32), words)
        return unpack_stream(words.to(torch.int32), format.bits)
    fields = unpack_stream(qzeros, format.bits)
    if int(fields.max()) == format.qmax:
        raise CheckpointError(
            f"{what} has version 1 fields of {format.qmax}, a zero point of 0 that overflowed; fields beside it may be "
            "damaged. Read it as version 2 if the label is wrong (--gptq-zero v2), or quantize again to gptq_v2"
        )
    return fields + 1
