"""Fields in 32-bit words where their number need not fill whole words.

Two ways to lay out a row of n fields:

    dense   the bit stream of kernels/formats.py, ceil(n * bits / 32) words; a field may straddle two words
    padded  32 // bits fields a word, ceil(n / (32 // bits)) words; at 3 bits two bits of every word are unused

At 2, 4 and 8 bits the two are one. What lies behind the last field is zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.kernels.formats import pack_stream, unpack_stream


def dense_words(n: int, bits: int) -> int:
    return -(-n * bits // 32)


def padded_words(n: int, bits: int) -> int:
    return -(-n // (32 // bits))


def pack_dense(fields: Tensor, bits: int) -> Tensor:
    """uint8 [..., n], values < 2^bits -> int32 [..., dense_words(n)]."""
    n = fields.shape[-1]
    period = 32 if bits == 3 else 32 // bits
    return pack_stream(F.pad(fields, (0, -n % period)), bits)[..., : dense_words(n, bits)].contiguous()


def unpack_dense(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 [..., dense_words(n)] -> uint8 [..., n]."""
    period = 3 if bits == 3 else 1
    return unpack_stream(F.pad(words, (0, -words.shape[-1] % period)), bits)[..., :n].contiguous()


def pack_padded(fields: Tensor, bits: int) -> Tensor:
    """uint8 [..., n], values < 2^bits -> int32 [..., padded_words(n)]."""
    per_word = 32 // bits
    padded = F.pad(fields, (0, -fields.shape[-1] % per_word)).to(torch.int64)
    cells = padded.reshape(*padded.shape[:-1], -1, per_word)
    words = (cells << (torch.arange(per_word) * bits)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_padded(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 [..., padded_words(n)] -> uint8 [..., n]."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    fields = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(-2)[..., :n].contiguous()
