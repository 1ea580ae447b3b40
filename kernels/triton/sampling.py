"""Tokens drawn on NVIDIA GPUs (device/sampling.py): temperature, min_p, top_k, top_p of a row, and the draw.

The definition is that of engine/draw.py. Weights are those of the C++ library; sums are exact integers instead of
float64, so a number within about 1e-8 of the border between two tokens may give the other one. The launches are the
same whatever the scores hold, and nothing is read back.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dibit.kernels.contract import ContractError, Dims
from dibit.kernels.triton.device.sampling import draw_kernel, hold_kernel, tally_kernel, weigh_kernel
from dibit.kernels.triton.limits import MAX_DRAWN_COLUMNS
from dibit.kernels.triton.small import argmax

BLOCK = 1024
TILE = 128
TALLIES = 512
STEPS = 6


def draw(
    scores: Tensor,
    settings: Tensor,
    *,
    top_k: bool,
    top_p: bool,
    highest: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Ids [R] int64 of scores [R, V] float32, V at most MAX_DRAWN_COLUMNS.

    settings [5, R] float64: temperature, 0 takes the highest score; min_p, 0 filters nothing; top_k, 0 or less filters
    nothing; top_p, 1 filters nothing; a number in [0, 1). `top_k` and `top_p` say whether any row may have one;
    `highest` is what argmax says of the scores, where that is known. A row whose highest score is not finite gets any
    id. Raises ContractError.
    """
    dims = Dims("draw")
    dims.check("scores", scores, "R V", (torch.float32,))
    r, v = scores.shape
    if settings.shape != (5, r) or settings.dtype != torch.float64 or settings.device != scores.device:
        raise ContractError(
            f"draw: settings are {list(settings.shape)} {settings.dtype} on {settings.device}; expected [5, {r}] "
            f"torch.float64 on {scores.device}"
        )
    if not 0 < v <= MAX_DRAWN_COLUMNS:
        raise ContractError(f"draw: rows of {v} scores; 1 to {MAX_DRAWN_COLUMNS} are supported")
    settings = settings.contiguous()
    ids = torch.empty(r, dtype=torch.int64, device=scores.device)
    if r == 0:
        return ids
    best, peaks = argmax(scores) if highest is None else highest
    blocks = triton.cdiv(v, BLOCK)
    weights = torch.empty_like(scores, dtype=torch.int32)
    tallies = torch.empty(r, 2 * STEPS, 32, dtype=torch.int64, device=scores.device)
    entries = torch.empty(r, 2 * STEPS + 1, 2, dtype=torch.int64, device=scores.device)
    block_sums = torch.empty(r, blocks, dtype=torch.int64, device=scores.device)
    block_ties = torch.empty(r, blocks, dtype=torch.int32, device=scores.device)
    weigh_kernel[(r, blocks)](
        scores,
        peaks,
        settings,
        weights,
        tallies,
        r,
        v,
        BLOCK=BLOCK,
        TALLIES=TALLIES,
        num_warps=4,
        enable_fp_fusion=False,
    )
    searches = [search for search, wanted in enumerate((top_k, top_p)) if wanted]
    for search in searches:
        for step in range(STEPS):
            tally_kernel[(r, blocks)](
                weights,
                settings,
                tallies,
                entries,
                r,
                v,
                step,
                SEARCH=search,
                AFTER_TOP_K=search == 1 and top_k,
                BLOCK=BLOCK,
                TILE=TILE,
                num_warps=4,
            )
    hold_kernel[(r, blocks)](
        weights,
        settings,
        tallies,
        entries,
        block_sums,
        block_ties,
        r,
        v,
        blocks,
        SEARCH=searches[-1] if searches else -1,
        BLOCK=BLOCK,
        num_warps=4,
    )
    draw_kernel[(r,)](
        weights,
        settings,
        entries,
        block_sums,
        block_ties,
        best,
        ids,
        r,
        v,
        blocks,
        BLOCK=BLOCK,
        MOST_BLOCKS=max(2, triton.next_power_of_2(blocks)),
        num_warps=4,
    )
    return ids
