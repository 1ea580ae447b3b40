"""EfficientQAT's own packed tensors to QTensor. Read only: the same weights are written as GPTQ version 2.

For a linear of N outputs and K inputs in groups of G:

    qweight  int32 [ceil(K / per_word), N]    codes along K
    qzeros   int32 [K / G, ceil(N / per_word)]  zero points as they are, along N
    scales   float [K / G, N]                 float32 after the end-to-end phase
    g_idx    int32 [K]                        k // G

with per_word = 32 // bits whole fields a word, so that at 3 bits two bits of a word are unused (unlike GPTQ's stream).
At 2 and 4 bits the tensors are those of GPTQ version 2. Its config.json says nothing of the quantization: width and
group size are found from the shapes, and the zero convention is checked against the values, in case it is a GPTQ file
that lost its config. Chen et al., "EfficientQAT", ACL 2025.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import ModuleRule, Quantization, TensorInfo, ZeroConvention
from dibit.engine.checkpoint.gptq import PARTS, check_order
from dibit.engine.checkpoint.module_patterns import module_patterns
from dibit.engine.checkpoint.packing import SAMPLED_ROWS, Headers, Sample, finite_scales
from dibit.engine.checkpoint.words import padded_words, unpack_padded
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import GROUP_SIZES, PER_CHANNEL, Format, QTensor

BITS = (2, 3, 4)


def detect_efficientqat(modules: Mapping[str, Mapping[str, TensorInfo]]) -> Quantization | None:
    """The quantization of packed modules without a config; None when their shapes are not EfficientQAT's.

    modules  headers of the parts of every packed module
    """
    formats: dict[str, Format] = {}
    for module, parts in modules.items():
        found = _format(parts)
        if found is None:
            return None
        formats[module] = found
    default, _ = Counter(formats.values()).most_common(1)[0]
    return Quantization(
        method="efficientqat",
        bits=default.bits,
        group_size=default.group_size,
        symmetric=False,
        checkpoint_format="efficientqat",
        quantizer="EfficientQAT, told from the shapes",
        dynamic=tuple(ModuleRule(pattern, form) for pattern, form in module_patterns(formats, default)),
    )


def _format(parts: Mapping[str, TensorInfo]) -> Format | None:
    if any(part not in parts for part in PARTS) or any(len(parts[part].shape) != 2 for part in PARTS[:3]):
        return None
    (rows, n), (groups, zero_words) = parts["qweight"].shape, parts["qzeros"].shape
    k = parts["g_idx"].numel
    if not groups or k % groups or tuple(parts["scales"].shape) != (groups, n):
        return None
    fitting = [b for b in BITS if (rows, zero_words) == (padded_words(k, b), padded_words(n, b))]
    size = PER_CHANNEL if groups == 1 else k // groups
    return Format(fitting[0], size) if len(fitting) == 1 and size in GROUP_SIZES else None


@dataclass(frozen=True)
class EfficientQatPacking:
    """See packing.Packing."""

    parts: ClassVar[tuple[str, ...]] = PARTS

    def shape(self, headers: Headers) -> tuple[int, int]:
        form = headers.require(*self.parts)
        headers.check_type("qweight", (torch.int32,), 2)
        headers.check_type("qzeros", (torch.int32,), 2)
        headers.check_type("g_idx", (torch.int32, torch.int64), 1)
        headers.check_scales("scales")
        k, n = headers.parts["g_idx"].numel, headers.parts["scales"].shape[1]
        groups = headers.groups(form, k)
        headers.expect(
            form,
            {
                "qweight": (padded_words(k, form.bits), n),
                "qzeros": (groups, padded_words(n, form.bits)),
                "scales": (groups, n),
            },
        )
        check_order(headers.module, headers.read("g_idx"), form, headers.source)
        return n, k

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        fields = _fields(tensors, format)
        if zeros == "v1":
            if int(fields.max()) == format.qmax:
                raise CheckpointError(
                    f"{source}: {module}.qzeros has version 1 fields of {format.qmax}, a zero point of 0 that "
                    "overflowed; read it as version 2 (--gptq-zero v2), or quantize again"
                )
            fields = fields + 1
        return QTensor(
            codes=_codes(tensors["qweight"], format, tensors["g_idx"].shape[0]),
            zeros=fields,
            scales=finite_scales(tensors["scales"], module=module, source=source).T.contiguous(),
            format=format,
        )

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> Sample:
        codes = _codes(tensors["qweight"][:, :SAMPLED_ROWS], format, tensors["g_idx"].shape[0])
        return Sample(codes, _fields(tensors, format), format)


def _codes(qweight: Tensor, format: Format, k: int) -> Tensor:
    return unpack_padded(qweight.T.contiguous(), format.bits, k)


def _fields(tensors: Mapping[str, Tensor], format: Format) -> Tensor:
    return unpack_padded(tensors["qzeros"], format.bits, tensors["scales"].shape[1]).T.contiguous()
