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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import TensorInfo, ZeroConvention
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
        parts = {part: getattr(self, part) for part in PARTS}
        return {f"{module}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


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
    if not bool(tensors.scales.isfinite().all()):
        raise CheckpointError(f"{source}: {module}.scales has values that are not finite; quantize the model again")
    fields = _zero_points(tensors.qzeros, format, zeros, wordwise=wordwise, what=f"{source}: {module}.qzeros")
    scales = tensors.scales if tensors.scales.dtype == torch.float16 else tensors.scales.float()
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
    for letter, size in (("N", n), ("K", k)):
        if size * bits % 32:
            raise CheckpointError(
                f"{module} has {letter} = {size}: {size} fields of {bits} bits do not fill whole 32-bit words, which "
                f"the GPTQ format needs; keep this layer in float or use a width for which {letter} * bits is a "
                "multiple of 32"
            )
    if int(q.codes.max()) > q.format.qmax or int(q.zeros.max()) > q.format.qmax:
        raise CheckpointError(f"{module} has codes or zero points above {q.format.qmax}, the largest of {bits} bits")
    fields = q.zeros
    if zeros == "v1":
        if int(fields.min()) == 0:
            raise CheckpointError(
                f"{module} has zero points of 0, which checkpoint_format gptq (version 1) cannot hold; write gptq_v2"
            )
        fields = fields - 1
    half = q.scales.to(torch.float16)
    return GptqTensors(
        qweight=pack_stream(q.codes, bits).T.contiguous(),
        qzeros=pack_stream(fields.T.contiguous(), bits),
        scales=(half if torch.equal(half.float(), q.scales.float()) else q.scales).T.contiguous(),
        g_idx=(torch.arange(k) // q.format.columns_per_group(k)).to(torch.int32),
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
