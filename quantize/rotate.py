"""Rotating the values of attention: the block computes the same, and its weights are easier to round.

Attention is linear in v and its rotation of positions does not touch v, so for every kv head h any orthogonal R_h
[D, D] may stand between its rows of v and the columns of o that read it, in every query head of its group (SpinQuant's
R2; Liu et al., "SpinQuant", ICLR 2025, after Ashkboos et al., "QuaRot", NeurIPS 2024):

    W_v^h <- R_hᵀ W_v^h     b_v^h <- R_hᵀ b_v^h     W_o^i <- W_o^i R_h     for all query heads i that read h

It merges into the weights and costs nothing at run time. A Hadamard matrix with random signs spreads every channel
over all others, so that no row or column keeps an outlier.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.quantize.block import BlockJob
from dibit.quantize.fold import copied


def rotate_values(block: Block, rotations: Tensor) -> Block:
    """A block that computes the same with `rotations` float64 [KH, D, D], orthogonal, between v and o."""
    sizes = block.sizes
    heads, width, start = sizes.kv_heads, sizes.head_dim, sizes.q_width + sizes.kv_width
    changed = copied(block)
    qkv, o = cast(FloatLinear, block.linears["qkv"]), cast(FloatLinear, block.linears["o"])
    rows = qkv.weight[start:].double().view(heads, width, -1)
    weight = qkv.weight.clone()
    weight[start:] = (rotations.mT @ rows).flatten(0, 1).to(weight.dtype)
    bias = qkv.bias
    if bias is not None:
        bias = bias.clone()
        old = bias[start:].double().view(heads, width, 1)
        bias[start:] = (rotations.mT @ old).flatten().to(bias.dtype)
    changed.linears["qkv"] = FloatLinear(weight, bias)
    # [hidden, KH, query heads of each, D]
    columns = o.weight.double().view(o.weight.shape[0], heads, sizes.heads // heads, width)
    rotated = torch.einsum("nhrd,hde->nhre", columns, rotations).reshape(o.weight.shape)
    changed.linears["o"] = FloatLinear(rotated.to(o.weight.dtype), o.bias)
    return changed


def rotated(job: BlockJob) -> Block:
    """The job's block with a random rotation, from its seed and layer, in every kv head."""
    sizes = job.block.sizes
    first = (job.seed << 32) + job.layer * sizes.kv_heads
    return rotate_values(
        job.block, torch.stack([random_rotation(sizes.head_dim, seed=first + head) for head in range(sizes.kv_heads)])
    )


def random_rotation(n: int, *, seed: int) -> Tensor:
    """Orthogonal float64 [n, n]: a Hadamard matrix with random signs of its rows for a power of two, else at random."""
    draws = torch.Generator().manual_seed(seed)
    if n & (n - 1):
        drawn, upper = torch.linalg.qr(torch.randn(n, n, generator=draws, dtype=torch.float64))
        # Without this the distribution would not be uniform over rotations.
        return torch.as_tensor(drawn * upper.diagonal().sign())
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (n, 1), generator=draws, dtype=torch.float64) * 2 - 1
    return torch.as_tensor(signs * matrix / math.sqrt(n))
