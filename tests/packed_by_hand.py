"""Packed linears as other tools write them, by arithmetic on large numbers: nothing here uses the code under test."""

from __future__ import annotations

import torch
from checkpoint_files import word_rows
from torch import Tensor

from dibit.kernels.formats import QTensor


def compressed_tensors_parts(q: QTensor, *, padded: bool, symmetric: bool = False) -> dict[str, Tensor]:
    """`padded` is the layout before 2026."""
    bits = q.format.bits
    per_word = 32 // bits if padded else None
    tensors = {
        "weight_packed": word_rows(q.codes, bits, per_word=per_word),
        "weight_scale": q.scales,
        "weight_shape": torch.tensor(q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = word_rows(q.zeros.T, bits, per_word=per_word).T.contiguous()
    return tensors


def efficientqat_parts(q: QTensor, *, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Whole fields a word, zero points as they are."""
    bits, k = q.format.bits, q.shape[1]
    return {
        "qweight": word_rows(q.codes, bits, per_word=32 // bits).T.contiguous(),
        "qzeros": word_rows(q.zeros.T, bits, per_word=32 // bits),
        "scales": q.scales.T.contiguous().to(dtype),
        "g_idx": (torch.arange(k) // q.format.columns_per_group(k)).to(torch.int32),
    }


def bitblas_parts(q: QTensor, *, zeros: str = "qzeros") -> dict[str, Tensor]:
    bits = q.format.bits
    per_byte = 8 // bits
    fields = [
        [sum(z << (i * bits) for i, z in enumerate(row[j : j + per_byte])) for j in range(0, len(row), per_byte)]
        for row in q.zeros.T.tolist()
    ]
    return {
        "qweight": _bytes([interleaved(row, bits) for row in q.codes.tolist()]),
        "scales": q.scales.half(),
        zeros: _bytes(fields),
    }


def interleaved(row: list[int], bits: int) -> list[int]:
    """Bytes of a row of codes as BitBLAS's kernels for float16 want them."""
    out: list[int] = []
    per_word = 32 // bits
    for start in range(0, len(row), per_word):
        word = 0
        for i, code in enumerate(row[start : start + per_word]):
            place = i * bits if bits == 8 else (i % 2) * 16 + (i // 2) * bits
            word |= code << place
        four = list(word.to_bytes(4, "little"))
        out.extend([four[0], four[2], four[1], four[3]] if bits == 2 else four)
    return out


def _bytes(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int8)
