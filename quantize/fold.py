"""Scaling the inputs of a linear, with the inverse folded into what produces them: the block computes the same.

    qkv      attention norm / s          any s
    o        rows of v (and bias) / s    s is that of a kv head's channels, shared by the query heads that read it
    gate_up  MLP norm / s                any s
    down     rows of up (and bias) / s   any s; the gate's activation does not see it

Attention is linear in v, and its rotation does not touch v, so the second is exact under grouped queries and RoPE.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import Sizes
from dibit.quantize.fake_quantize import straight


def copied(block: Block) -> Block:
    """A block whose parts may be replaced without the original noticing."""
    return block.with_linears(dict(block.linears))


def input_width(sizes: Sizes, key: str) -> int:
    """How many scales the inputs of site `key` may have."""
    return {"qkv": sizes.hidden, "o": sizes.kv_width, "gate_up": sizes.hidden, "down": sizes.intermediate}[key]


def expand(sizes: Sizes, key: str, scales: Tensor) -> Tensor:
    """Scales [input_width] as one for each input column of site `key`."""
    if key != "o":
        return scales
    per_head = scales.view(sizes.kv_heads, 1, sizes.head_dim)
    return per_head.expand(-1, sizes.heads // sizes.kv_heads, -1).reshape(-1)


def fold(block: Block, key: str, scales: Tensor, *, stored: torch.dtype = torch.float32) -> None:
    """Scale the inputs of site `key` by 1 / scales and its columns by `scales` [input_width], positive and finite.

    stored  type in which the norms will be stored; the scales used are those that are left after its rounding, so
            that nothing is lost
    """
    sizes = block.sizes
    if key in ("qkv", "gate_up"):
        name = "attn_norm" if key == "qkv" else "mlp_norm"
        norm = cast(Tensor, getattr(block, name))
        # Straight through, or gradients would be rounded to that type as well.
        exact = norm / scales
        divided = straight(exact, exact.detach().to(stored).float())
        usable = (divided != 0) & divided.isfinite()
        # Chosen before it is divided by, or the gradient of what is not chosen would be NaN.
        divided = torch.where(usable, divided, norm)
        setattr(block, name, divided)
        scales = torch.where(usable, norm / torch.where(usable, divided, 1.0), 1.0)
    elif key == "o":
        _divide_rows(block, "qkv", scales, start=sizes.q_width + sizes.kv_width)
    else:
        _divide_rows(block, "gate_up", scales, start=sizes.intermediate)
    linear = cast(FloatLinear, block.linears[key])
    block.linears[key] = FloatLinear(linear.weight * expand(sizes, key, scales), linear.bias)


def _divide_rows(block: Block, key: str, scales: Tensor, *, start: int) -> None:
    linear = cast(FloatLinear, block.linears[key])
    rows = torch.ones(linear.weight.shape[0])
    rows[start : start + scales.numel()] = 1 / scales
    bias = None if linear.bias is None else linear.bias * rows
    block.linears[key] = FloatLinear(linear.weight * rows[:, None], bias)
