"""AWQ's packed tensors (version "gemm", 4 bits) to and from QTensor, bit for bit.

For a linear of N outputs and K inputs in groups of G:

    qweight  int32 [K, N / 8]      codes, eight neighbouring outputs a word
    qzeros   int32 [K / G, N / 8]  zero points as they are
    scales   float [K / G, N]

Within a word the outputs stand in the order 0 2 4 6 1 3 5 7, lowest bits first: the order in which a GPU kernel wants
to take them apart. Lin et al., "AWQ", MLSys 2024; the layout is that of the tool AutoAWQ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import ModuleRule, Quantization, ZeroConvention
from dibit.engine.checkpoint.module_patterns import float_linears, in_a_layer
from dibit.engine.checkpoint.packing import (
    CannotHold,
    Facts,
    Headers,
    check_codes,
    check_grid,
    compact_scales,
    finite_scales,
)
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.quantization_config import (
    alias,
    checked_format,
    quantizer_of,
    symmetric_of,
    whole_number,
)
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor, pack_stream, unpack_stream

BITS = 4
_PER_WORD = 32 // BITS
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = tuple(_ORDER.index(column) for column in range(_PER_WORD))


def parse_awq(raw: Mapping[str, Any], source: str) -> Quantization:
    """Raises CheckpointError on another version, another width, or keys of the wrong type."""
    layout = raw.get("version") or raw.get("checkpoint_format") or raw.get("format") or "gemm"
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise CheckpointError(
            f"{source} is AWQ of version {layout!r}; supported: gemm. Export the model again in that version"
        )
    bits = whole_number(alias(raw, "bits", source), "bits", source)
    group_size = whole_number(alias(raw, "group_size", source), "group_size", source)
    if bits != BITS:
        raise CheckpointError(f"{source} is AWQ of {bits} bits; supported: {BITS}. Use a GPTQ checkpoint of the model")
    checked_format(bits, group_size, source)
    skipped = raw.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(item, str) and item for item in skipped):
        raise CheckpointError(f"{source} has modules_to_not_convert {skipped!r:.60}; expected a list of names")
    return Quantization(
        method="awq",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric_of(raw, source),
        checkpoint_format="gemm",
        quantizer=quantizer_of(raw),
        dynamic=tuple(ModuleRule(f".*{re.escape(item)}", None) for item in skipped),
    )


@dataclass(frozen=True)
class AwqPacking:
    """See packing.Packing and packing.Export."""

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    zeros: ClassVar[ZeroConvention] = "v2"
    label: ClassVar[str] = "awq"
    side_file: ClassVar[str | None] = None

    def shape(self, headers: Headers) -> tuple[int, int]:
        form = headers.require(*self.parts)
        headers.check_type("qweight", (torch.int32,), 2)
        headers.check_type("qzeros", (torch.int32,), 2)
        headers.check_scales("scales")
        k, words = headers.parts["qweight"].shape
        n = words * _PER_WORD
        groups = headers.groups(form, k)
        headers.expect(form, {"qweight": (k, words), "qzeros": (groups, words), "scales": (groups, n)})
        return n, k

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        return QTensor(
            codes=_take_apart(tensors["qweight"]).T.contiguous(),
            zeros=_take_apart(tensors["qzeros"]).T.contiguous(),
            scales=finite_scales(tensors["scales"], module=module, source=source).T.contiguous(),
            format=format,
        )

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> None:
        return None

    def check(self, format: Format, n: int, k: int, *, module: str) -> None:
        check_grid(format, module=module, label=self.label)
        if format.bits != BITS:
            raise CannotHold(
                f"{module} has {format.bits} bits; awq holds {BITS} only. Convert to gptq or compressed-tensors, "
                f"or quantize the float model with --bits {BITS}"
            )
        if n % _PER_WORD:
            raise CannotHold(
                f"{module} has N = {n}; awq needs a multiple of {_PER_WORD}. Convert to compressed-tensors"
            )
        if not in_a_layer(module):
            raise CannotHold(f"{module} is quantized, but awq holds the linears of layers only; convert to gptq")

    def pack(self, q: QTensor, *, module: str) -> dict[str, Tensor]:
        self.check(q.format, *q.shape, module=module)
        check_codes(q, module=module, label=self.label)
        return {
            "qweight": _put_together(q.codes.T),
            "qzeros": _put_together(q.zeros.T),
            "scales": compact_scales(q.scales).T.contiguous(),
        }

    def config(
        self, modules: Mapping[str, PackedModule], names: Iterable[str], *, method: str | None, facts: Facts
    ) -> dict[str, Any]:
        sizes = sorted({info.group_size for info in modules.values()})
        if len(sizes) > 1:
            raise CannotHold(
                f"the linears have groups of {', '.join(map(str, sizes))} columns; awq holds one group size. "
                "Convert to gptq or compressed-tensors"
            )
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": sizes[0],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": float_linears(names, modules) or None,
            "meta": {"quantizer": f"dibit:{version('dibit')}", "method": method, **facts},
        }


def _take_apart(words: Tensor) -> Tensor:
    """int32 [R, W] -> uint8 [R, 8 W], outputs in their own order."""
    rows, count = words.shape
    return unpack_stream(words, BITS).reshape(rows, count, _PER_WORD)[..., list(_PLACE)].reshape(rows, -1)


def _put_together(fields: Tensor) -> Tensor:
    rows = fields.shape[0]
    ordered = fields.reshape(rows, -1, _PER_WORD)[..., list(_ORDER)]
    return pack_stream(ordered.reshape(rows, -1), BITS)
