"""compressed-tensors' `pack-quantized` tensors to and from QTensor, bit for bit.

For a linear of N outputs and K inputs in groups of G (the whole row for the strategy "channel"):

    weight_packed      int32 [N, ceil(K * bits / 32)]    codes along K
    weight_zero_point  int32 [ceil(N * bits / 32), K/G]  zero points along N; asymmetric weights only
    weight_scale       float [N, K/G]
    weight_shape       int [2]                           N, K
    weight_g_idx       int32 [K]                         only k // G is supported (no act-order)

The library counts codes and zero points from -2^(bits-1) and stores them with 2^(bits-1) added, which makes the stored
fields those of a QTensor. Its 3-bit words changed in 2026: once ten fields a word, now a dense stream of bits. Shapes
tell the two apart, and where they cannot (K of 16, 48 or 80) the two bits that the old layout leaves empty. Written is
the dense stream. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import ZeroConvention
from dibit.engine.checkpoint.compressed_tensors_config import (
    FORMAT,
    compressed_tensors_config,
    parse_compressed_tensors,
)
from dibit.engine.checkpoint.gptq import check_order
from dibit.engine.checkpoint.packing import Facts, Headers, check_codes, check_grid, compact_scales, finite_scales
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.words import (
    dense_words,
    pack_dense,
    padded_words,
    unpack_dense,
    unpack_padded,
)
from dibit.kernels.formats import Format, QTensor

__all__ = ["FORMAT", "CompressedTensorsPacking", "parse_compressed_tensors"]

_INTEGERS = (torch.int64, torch.int32)
_PACKED, _ZEROS, _SCALE, _SHAPE, _ORDER = (
    "weight_packed",
    "weight_zero_point",
    "weight_scale",
    "weight_shape",
    "weight_g_idx",
)


@dataclass(frozen=True)
class CompressedTensorsPacking:
    """See packing.Packing and packing.Export."""

    parts: ClassVar[tuple[str, ...]] = (_PACKED, _ZEROS, _SCALE, _SHAPE, _ORDER)
    zeros: ClassVar[ZeroConvention] = "v2"
    label: ClassVar[str] = "compressed-tensors"
    side_file: ClassVar[str | None] = None

    def shape(self, headers: Headers) -> tuple[int, int]:
        form = headers.require(_PACKED, _SCALE, _SHAPE, *(() if headers.symmetric else (_ZEROS,)))
        headers.check_type(_PACKED, (torch.int32,), 2)
        headers.check_type(_ZEROS, (torch.int32, torch.int8), 2)
        headers.check_type(_SHAPE, _INTEGERS, 1)
        headers.check_type(_ORDER, _INTEGERS, 1)
        headers.check_scales(_SCALE)
        if headers.parts[_SHAPE].shape != (2,):
            raise headers.error(f"has weight_shape of {headers.parts[_SHAPE].shape}; expected two numbers")
        n, k = (int(size) for size in headers.read(_SHAPE))
        if n < 1 or k < 1 or n != headers.parts[_PACKED].shape[0]:
            raise headers.error(f"has weight_shape [{n}, {k}], which does not belong to {headers.shapes()}")
        groups = headers.groups(form, k)
        words = headers.parts[_PACKED].shape[1]
        if words not in (dense_words(k, form.bits), padded_words(k, form.bits)):
            headers.expect(form, {_PACKED: (n, dense_words(k, form.bits))})
        headers.expect(form, {_SCALE: (n, groups)})
        self._check_zeros(headers, form, n, groups)
        if _ORDER in headers.parts:
            headers.expect(form, {_ORDER: (k,)})
            check_order(headers.module, headers.read(_ORDER), form, headers.source)
        return n, k

    def _check_zeros(self, headers: Headers, form: Format, n: int, groups: int) -> None:
        info = headers.parts.get(_ZEROS)
        if info is None:
            return
        if info.dtype == torch.int8:
            headers.expect(form, {_ZEROS: (n, groups)})
        elif tuple(info.shape) != (padded_words(n, form.bits), groups):
            headers.expect(form, {_ZEROS: (dense_words(n, form.bits), groups)})

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        n, k = (int(size) for size in tensors[_SHAPE])
        middle = 1 << (format.bits - 1)
        unpack = unpack_padded if format.bits == 3 and _is_padded(tensors, 3, n, k) else unpack_dense
        stored = tensors.get(_ZEROS)
        if stored is None:
            fields = torch.full((n, format.groups(k)), middle, dtype=torch.uint8)
        elif stored.dtype == torch.int8:
            fields = (stored.to(torch.int16) + middle).to(torch.uint8)
        else:
            fields = unpack(stored.T.contiguous(), format.bits, n).T.contiguous()
        return QTensor(
            codes=unpack(tensors[_PACKED], format.bits, k),
            zeros=fields,
            scales=finite_scales(tensors[_SCALE], module=module, source=source),
            format=format,
        )

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> None:
        return None

    def check(self, format: Format, n: int, k: int, *, module: str) -> None:
        check_grid(format, module=module, label=self.label)

    def pack(self, q: QTensor, *, module: str) -> dict[str, Tensor]:
        self.check(q.format, *q.shape, module=module)
        check_codes(q, module=module, label=self.label)
        bits = q.format.bits
        tensors = {
            _PACKED: pack_dense(q.codes, bits),
            _SCALE: compact_scales(q.scales).contiguous(),
            _SHAPE: torch.tensor(q.shape, dtype=torch.int64),
        }
        if bool((q.zeros != 1 << (bits - 1)).any()):
            tensors[_ZEROS] = pack_dense(q.zeros.T.contiguous(), bits).T.contiguous()
        return tensors

    def config(
        self, modules: Mapping[str, PackedModule], names: Iterable[str], *, method: str | None, facts: Facts
    ) -> dict[str, Any]:
        return compressed_tensors_config(modules, names, method=method, facts=facts)


def _is_padded(tensors: Mapping[str, Tensor], bits: int, n: int, k: int) -> bool:
    """Whether 3-bit fields stand ten to a word: by the shape of either tensor, else by the bits that this leaves."""
    packed = [(tensors[_PACKED], 1, k)]
    if _ZEROS in tensors and tensors[_ZEROS].dtype == torch.int32:
        packed.append((tensors[_ZEROS], 0, n))
    for words, axis, count in packed:
        if dense_words(count, bits) != padded_words(count, bits):
            return words.shape[axis] == padded_words(count, bits)
    return not any(bool((words >> 30).any()) for words, _, _ in packed)
