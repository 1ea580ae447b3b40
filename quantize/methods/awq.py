"""AWQ: give the channels with large inputs a finer grid by scaling them up before rounding.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", MLSys 2024. For the inputs x of a site, with m = mean |x| of every channel, the scales
are

    s = m^r / sqrt(max m^r · min m^r)        r from a grid of [0, 1)

with the r whose rounded weight, Q(W · s) / s, gives the least squared error of the module's output: the whole
attention for qkv, the whole MLP for gate_up, the site itself for o and down. r = 0 is plain rounding. 1/s goes into
the norm, the rows of v or the rows of up in front (fold.py); the result is an ordinary checkpoint. Where several query
heads share a v, the mean is taken over them and they share the scale; the released code leaves the pair out there.

Then the range of each group is clipped where that lowers the error of the group's contribution to the output, for all
linears but q and k. Needs a few thousand tokens. At 2 bits it may lose to plain rounding in perplexity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import LinearSite
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.block import BlockJob, QuantizedBlock
from dibit.quantize.fold import copied, expand, fold
from dibit.quantize.stats import Need, SiteFailure

# Of the released code: below this a scale is cut off; ranges shrink to no less than half, in steps of 1/20.
LEAST_SCALE = 1e-4
CLIP_STEPS = 10
CLIP_DENOMINATOR = 20
# Elements of the temporaries of the clip search.
CLIP_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling and clipping, then rounding to nearest.

    symmetric      zero points in the middle of the code range
    ratios         exponents tried, evenly in [0, 1)
    clip           search for narrower ranges afterwards
    search_tokens  tokens of calibration text that the searches look at, at most; whole sequences, at least one
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})

    symmetric: bool = False
    ratios: int = 20
    clip: bool = True
    search_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.ratios < 1:
            raise ConfigError(f"ratios is {self.ratios}; it must be at least 1")
        if self.search_tokens < 1:
            raise ConfigError(f"search_tokens is {self.search_tokens}; it must be at least 1")

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        """Raises SiteFailure when the hidden states are not finite."""
        x = self._sample(job)
        if not bool(x.isfinite().all()):
            raise SiteFailure("the inputs seen during calibration are not finite")
        block = copied(job.block)
        self.scale(job, block, x, job.float_type)
        return QuantizedBlock.folded(job, block, self.rounded(job, block, x))

    def _sample(self, job: BlockJob) -> Tensor:
        """The first segments, together at most `search_tokens`, but at least one: [B, T, hidden]."""
        taken: list[Tensor] = []
        for _, x in job.quantized.batches(1):
            if taken and (len(taken) + 1) * x.shape[1] > self.search_tokens:
                break
            taken.append(x)
        return torch.cat(taken)

    def scale(self, job: BlockJob, block: Block, x: Tensor, stored: torch.dtype) -> None:
        """Fold the scales of all four sites into `block`, whose inputs are `x` [B, T, hidden]."""
        formats = {site.key: job.formats[site.name] for site in job.sites}

        def attention(own: Block) -> Tensor:
            return own.dense_attention(x, job.cos, job.sin)

        self._scale_site(block, "qkv", formats["qkv"], stored, attention, _normed(block, x, block.attn_norm))
        attended = _inputs(block, "o", attention)
        self._scale_site(block, "o", formats["o"], stored, lambda own: own.linears["o"](attended), attended)
        h = x + attention(block)

        def mlp(own: Block) -> Tensor:
            return own.dense_mlp(h)

        self._scale_site(block, "gate_up", formats["gate_up"], stored, mlp, _normed(block, h, block.mlp_norm))
        gated = _inputs(block, "down", mlp)
        self._scale_site(block, "down", formats["down"], stored, lambda own: own.linears["down"](gated), gated)

    def _scale_site(
        self,
        block: Block,
        key: str,
        format: Format,
        stored: torch.dtype,
        output: Callable[[Block], Tensor],
        inputs: Tensor,
    ) -> None:
        """`output` of a block, from `inputs` [.., K] of the site."""
        sizes = block.sizes
        size = inputs.abs().mean(dim=tuple(range(inputs.dim() - 1)))
        if key == "o":
            size = size.view(sizes.kv_heads, -1, sizes.head_dim).mean(dim=1).reshape(-1)
        linear = cast(FloatLinear, block.linears[key])
        reference = output(block)
        trial = copied(block)
        best, least = torch.ones_like(size), float("inf")
        for i in range(self.ratios):
            scales = _scales(size, i / self.ratios)
            columns = expand(sizes, key, scales)
            w = linear.weight * columns
            rounded = dequantize(format.encode(w, *format.ranges(w, symmetric=self.symmetric)))
            trial.linears[key] = FloatLinear(rounded / columns, linear.bias)
            error = float((output(trial) - reference).square().mean(dtype=torch.float64))
            if error < least:
                best, least = scales, error
        fold(block, key, best, stored=stored)

    def rounded(self, job: BlockJob, block: Block, x: Tensor) -> dict[str, QTensor]:
        """The sites of a block with its scales folded in."""
        inputs = {
            "qkv": _normed(block, x, block.attn_norm),
            "o": _inputs(block, "o", lambda own: own.dense_attention(x, job.cos, job.sin)),
        }
        h = x + cast(FloatLinear, block.linears["o"])(inputs["o"])
        inputs["gate_up"] = _normed(block, h, block.mlp_norm)
        inputs["down"] = _inputs(block, "down", lambda own: own.dense_mlp(h))
        return {site.name: self._round(job, site, block, inputs[site.key]) for site in job.sites}

    def _round(self, job: BlockJob, site: LinearSite, block: Block, inputs: Tensor) -> QTensor:
        w = clipped = cast(FloatLinear, block.linears[site.key]).weight
        chosen = job.formats[site.name]
        if self.clip:
            # What q and k get wrong is not told by their own outputs: the softmax stands in between.
            start = site.parts[0].n + site.parts[1].n if site.key == "qkv" else 0
            rows = clip_rows(w[start:], inputs.reshape(-1, site.k), chosen, symmetric=self.symmetric)
            clipped = torch.cat([w[:start], rows])
        return chosen.encode(w, *chosen.ranges(clipped, symmetric=self.symmetric))


def _scales(size: Tensor, ratio: float) -> Tensor:
    scales = size.pow(ratio).clamp_min(LEAST_SCALE)
    return scales / (scales.max() * scales.min()).sqrt()


def clip_rows(w: Tensor, x: Tensor, format: Format, *, symmetric: bool) -> Tensor:
    """`w` [N, K] cut off, group by group, where its rounding then serves the inputs `x` [R, K] best.

    The error of a group is that of its own share of the output, δ xᵀx δᵀ with the group's columns.
    """
    n, k = w.shape
    width = format.columns_per_group(k)
    single = Format(bits=format.bits, group_size=-1, zero_grid=format.zero_grid)
    clipped = torch.empty_like(w)
    for start in range(0, k, width):
        columns = slice(start, start + width)
        moments = x[:, columns].T @ x[:, columns] / x.shape[0]
        step = max(1, CLIP_ELEMENTS // width)
        for first in range(0, n, step):
            rows = slice(first, first + step)
            clipped[rows, columns] = _clip(w[rows, columns], moments, single, symmetric=symmetric)
    return clipped


def _clip(w: Tensor, moments: Tensor, format: Format, *, symmetric: bool) -> Tensor:
    bound = w.abs().amax(dim=1, keepdim=True)
    best, least = w, torch.full((w.shape[0],), float("inf"))
    for i in range(CLIP_STEPS):
        most = bound * (1 - i / CLIP_DENOMINATOR)
        tried = torch.clamp(w, -most, most)
        delta = dequantize(format.encode(w, *format.ranges(tried, symmetric=symmetric))) - w
        error = ((delta @ moments) * delta).sum(dim=1)
        better = error < least
        best = torch.where(better[:, None], tried, best)
        least = torch.where(better, error, least)
    return best


def _normed(block: Block, x: Tensor, norm: Tensor) -> Tensor:
    return rms_norm_reference(x, norm, block.sizes.norm_eps)


def _inputs(block: Block, key: str, run: Callable[[Block], Tensor]) -> Tensor:
    """What site `key` is given when `run` runs the half of the block that ends in it."""
    probe = copied(block)
    probe.linears[key] = lambda x: x
    return run(probe)
