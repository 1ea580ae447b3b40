"""A step's work as tensors: the sequences' tokens one after another, where their keys go, which rows need logits.

Built for every step, so it costs a few microseconds a sequence: plain lists, one numpy array each, no copy to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dibit.engine.step import Step


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of B sequences.

    tokens        [T] int64
    positions     [T] int64      position in the token's sequence
    slots         [T] int64      block * block_size + offset of the token's key and value; -1 writes nothing
    cu_seqlens    [B + 1] int32  first token of each sequence
    seq_lens      [B] int32      keys of each sequence, this step's included
    block_tables  [B, max_blocks] int32; entries past a sequence's end are 0 and unread
    rows          [R] int64      tokens whose final hidden state is wanted; None: all of them, in order
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    rows: Tensor | None = None


def build_batch(
    step: Step, *, block_size: int, rows: list[int] | None = None, device: torch.device | None = None
) -> Batch:
    """Tensors of a step. `rows` are the tokens (of the T) that need a final hidden state; None means all."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    cu_seqlens = [0]
    seq_lens: list[int] = []
    tables: list[list[int]] = []
    for chunk in step.chunks:
        start, stop = chunk.start, chunk.stop + len(chunk.drafts)
        blocks = chunk.request.block_ids[: -(-stop // block_size)]
        tokens += chunk.request.token_ids[start : chunk.stop]
        tokens += chunk.drafts
        if stop - start == 1:
            positions.append(start)
            slots.append(blocks[-1] * block_size + start % block_size)
        else:
            positions += range(start, stop)
            slots += [blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        cu_seqlens.append(len(tokens))
        seq_lens.append(stop)
        tables.append(blocks)
    block_tables = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
    for row, blocks in zip(block_tables, tables, strict=True):
        row[: len(blocks)] = blocks

    return Batch(
        tokens=_tensor(np.array(tokens, dtype=np.int64), device),
        positions=_tensor(np.array(positions, dtype=np.int64), device),
        slots=_tensor(np.array(slots, dtype=np.int64), device),
        cu_seqlens=_tensor(np.array(cu_seqlens, dtype=np.int32), device),
        seq_lens=_tensor(np.array(seq_lens, dtype=np.int32), device),
        block_tables=_tensor(block_tables, device),
        rows=None if rows is None else _tensor(np.array(rows, dtype=np.int64), device),
    )


def _tensor(values: NDArray[Any], device: torch.device | None) -> Tensor:
    made = torch.from_numpy(values)
    return made if device is None or device.type == "cpu" else made.to(device)
