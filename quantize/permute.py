"""Another order of channels inside a block: it computes the same, and groups hold channels that matter alike.

What GPTQ's g_idx buys, columns of similar importance in one group, without g_idx: the channels between gate/up and
down, and those of every kv head between v and o, have no fixed order, so they are sorted in the weights themselves and
nothing remains to be done at run time.

    mlp      rows of gate and up (and biases), columns of down
    values   rows of v (and bias) inside each kv head, columns of o in every query head that reads it
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import Sizes
from dibit.quantize.block import BlockJob
from dibit.quantize.collect import inputs
from dibit.quantize.fold import copied


def permute(block: Block, *, mlp: Tensor, values: Tensor) -> Block:
    """A block that computes the same, to the bit but for the order of sums.

    mlp     [intermediate], the old channel at each new place
    values  [KH, D], the same inside every kv head
    """
    sizes = block.sizes
    start = sizes.q_width + sizes.kv_width
    within = (torch.arange(sizes.kv_heads)[:, None] * sizes.head_dim + values).flatten()
    changed = copied(block)
    _rows(changed, "qkv", torch.cat([torch.arange(start), start + within]))
    _rows(changed, "gate_up", torch.cat([mlp, sizes.intermediate + mlp]))
    repeated = values.repeat_interleave(sizes.heads // sizes.kv_heads, dim=0)
    _columns(changed, "o", (torch.arange(sizes.heads)[:, None] * sizes.head_dim + repeated).flatten())
    _columns(changed, "down", mlp)
    return changed


def permuted(job: BlockJob) -> Block:
    """The job's block, its channels sorted by the squared inputs that o and down see in the quantized stream."""

    def squares(key: str) -> Tensor:
        seen = inputs(job.block, key, job.quantized, job.cos, job.sin, batch=job.batch)
        sums = [x.double().square().sum(dim=(0, 1)) for _, x in seen]
        return torch.stack(sums).sum(dim=0)

    mlp, values = by_importance(job.block.sizes, squares("down"), squares("o"))
    return permute(job.block, mlp=mlp, values=values)


def by_importance(sizes: Sizes, down: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """`mlp` and `values` for `permute`, the most important channels first.

    down, o  mean squared inputs of these linears, [intermediate] and [H · D]; a channel of v counts by all query heads
             that read it
    """
    per_value = o.view(sizes.kv_heads, -1, sizes.head_dim).mean(dim=1)
    order = torch.argsort(per_value, dim=1, descending=True, stable=True)
    return torch.argsort(down, descending=True, stable=True), order


def _rows(block: Block, key: str, order: Tensor) -> None:
    linear = cast(FloatLinear, block.linears[key])
    block.linears[key] = FloatLinear(linear.weight[order], None if linear.bias is None else linear.bias[order])


def _columns(block: Block, key: str, order: Tensor) -> None:
    linear = cast(FloatLinear, block.linears[key])
    block.linears[key] = FloatLinear(linear.weight[:, order].contiguous(), linear.bias)
