"""Fields in words that they do not fill: against arithmetic on one large number, and back."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import word_rows

from dibit.engine.checkpoint.words import (
    dense_words,
    pack_dense,
    pack_padded,
    padded_words,
    unpack_dense,
    unpack_padded,
)
from dibit.kernels.formats import BITS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 7, 10, 11, 31, 32, 33, 48, 80, 100])
def test_both_layouts(bits: int, n: int) -> None:
    fields = torch.randint(0, 1 << bits, (3, n), dtype=torch.uint8)
    fields[1] = (1 << bits) - 1
    dense, padded = pack_dense(fields, bits), pack_padded(fields, bits)
    assert torch.equal(dense, word_rows(fields, bits))
    assert torch.equal(padded, word_rows(fields, bits, per_word=32 // bits))
    assert dense.shape == (3, dense_words(n, bits))
    assert padded.shape == (3, padded_words(n, bits))
    assert torch.equal(unpack_dense(dense, bits, n), fields)
    assert torch.equal(unpack_padded(padded, bits, n), fields)
