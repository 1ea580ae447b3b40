"""Steps become tensors: positions, slots across block borders, tables, rows."""

from __future__ import annotations

import torch
from tiny_models import make_request

from dibit.engine.batch import build_batch
from dibit.engine.step import Chunk, Step


def test_a_mixed_step() -> None:
    decoding = make_request(range(10, 20))
    decoding.block_ids = [7, 3, 5, 9]
    prefilling = make_request(range(30, 50))
    prefilling.block_ids = [2, 8]
    step = Step((Chunk(decoding, 9, 1), Chunk(prefilling, 2, 5)))
    batch = build_batch(step, block_size=4)
    assert batch.tokens.tolist() == [19, 32, 33, 34, 35, 36]
    assert batch.positions.tolist() == [9, 2, 3, 4, 5, 6]
    assert batch.slots.tolist() == [5 * 4 + 1, 10, 11, 32, 33, 34]
    assert batch.cu_seqlens.tolist() == [0, 1, 6]
    assert batch.seq_lens.tolist() == [10, 7]
    # Blocks beyond the sequence's end (here 9) are not in the table.
    assert batch.block_tables.tolist() == [[7, 3, 5], [2, 8, 0]]
    assert batch.rows is None
    assert {t.dtype for t in (batch.tokens, batch.positions, batch.slots)} == {torch.int64}
    assert {t.dtype for t in (batch.cu_seqlens, batch.seq_lens, batch.block_tables)} == {torch.int32}


def test_a_decode_step_on_a_block_border() -> None:
    for length, slot, table in ((8, 4 * 3 + 3, [6, 3]), (9, 4 * 1, [6, 3, 1])):
        request = make_request(range(length))
        request.block_ids = [6, 3, 1]
        batch = build_batch(Step((Chunk(request, length - 1, 1),)), block_size=4, rows=[0])
        assert batch.slots.tolist() == [slot]
        assert batch.block_tables.tolist() == [table]
        assert batch.rows is not None
        assert batch.rows.tolist() == [0]


def test_output_tokens_follow_the_prompt() -> None:
    request = make_request([4, 5, 6])
    request.token_ids += [70, 71]
    request.block_ids = [0, 1]
    assert build_batch(Step((Chunk(request, 2, 3),)), block_size=4).tokens.tolist() == [6, 70, 71]
