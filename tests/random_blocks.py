"""One random decoder block in memory, with grouped queries and biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.rope import Rope
from dibit.engine.models.spec import Sizes

KEYS = ("qkv", "o", "gate_up", "down")


def sizes(heads: int, kv_heads: int) -> Sizes:
    return Sizes(
        layers=1,
        hidden=48,
        intermediate=80,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=16,
        vocab=10,
        max_positions=64,
        norm_eps=1e-5,
        tied_head=True,
        rope=Rope(1e4, 16),
        qkv_bias=True,
        mlp_bias=True,
    )


def random_block(own: Sizes, seed: int = 0) -> Block:
    rng = torch.Generator().manual_seed(seed)

    def linear(n: int, k: int) -> FloatLinear:
        return FloatLinear(torch.randn(n, k, generator=rng) * k**-0.5, torch.randn(n, generator=rng) * 0.3)

    linears: dict[str, Any] = {
        "qkv": linear(own.q_width + 2 * own.kv_width, own.hidden),
        "o": linear(own.hidden, own.q_width),
        "gate_up": linear(2 * own.intermediate, own.hidden),
        "down": linear(own.hidden, own.intermediate),
    }
    norms = [torch.randn(own.hidden, generator=rng) * 0.2 + 1 for _ in range(2)]
    return Block(own, linears=linears, attn_norm=norms[0], mlp_norm=norms[1])


def run(block: Block, x: Tensor) -> Tensor:
    return block.dense(x, *block.sizes.rope.tables(x.shape[1]))
