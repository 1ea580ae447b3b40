"""A job for a method over whole blocks: one random block, random hidden states of 8 segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from random_blocks import KEYS, random_block, sizes

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.quantize.block import BlockJob
from dibit.quantize.streams import HiddenStates, StreamConfig, advance


def make_job(
    directory: Path,
    *,
    bits: int = 3,
    float_type: torch.dtype = torch.float32,
    activation_bits: int | None = None,
    same_streams: bool = False,
) -> BlockJob:
    """`same_streams`: nothing was quantized before this block; otherwise what was is unrelated noise."""
    block = random_block(sizes(6, 2))
    sites = []
    for key in KEYS:
        linear: Any = block.linears[key]
        n, k = linear.weight.shape
        sites.append(LinearSite(f"layers.0.{key}", (Part(key, n),), n, k, "x", bias=True))
    cos, sin = block.sizes.rope.tables(12)
    rng = torch.Generator().manual_seed(1)
    streams = []
    for _ in range(2):
        own = HiddenStates(8, 12, block.sizes.hidden, config=StreamConfig(), directory=directory)
        own.write(0, torch.randn(8, 12, block.sizes.hidden, generator=rng))
        streams.append(own)
    formats = {site.name: Format(bits, 16) for site in sites}
    float_stream = streams[0] if same_streams else streams[1]
    outputs = float_stream.empty_like()
    advance(float_stream, block, cos, sin, batch=4, into=outputs)
    return BlockJob(
        layer=0,
        block=block,
        sites=tuple(sites),
        formats=formats,
        quantized=streams[0],
        float_stream=float_stream,
        float_outputs=outputs,
        cos=cos,
        sin=sin,
        batch=4,
        seed=0,
        float_type=float_type,
        activation_bits=activation_bits,
    )


def packed_block(job: BlockJob, block: Block, weights: dict[str, QTensor]) -> Block:
    """`block` computing with `weights`, by site name."""
    linears: dict[str, Any] = {}
    for site in job.sites:
        linear: Any = block.linears[site.key]
        linears[site.key] = FloatLinear(dequantize(weights[site.name]), linear.bias)
    return Block(block.sizes, linears=linears, attn_norm=block.attn_norm, mlp_norm=block.mlp_norm)
