"""SmoothQuant: move the loud channels of the activations into the weights, then round to nearest.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023. The inputs of a site are divided by

    s = (max |x|)^α / (max |w|)^(1-α)        for each channel

and its columns multiplied; 1/s goes into the norm, the rows of v or the rows of up in front (fold.py), so the result
is an ordinary checkpoint. Other than in the released code, o and down are scaled too, query heads that share a v share
its scales, and α is searched for each site: the one whose rounded block, weights and inputs, loses least on held-out
text, no scaling at all included. What was chosen for one site holds while the next is searched.

The baseline for low-bit activations; without them it is a scaling search for weights alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.kernels.formats import QTensor
from dibit.quantize.activations import rounded_inputs
from dibit.quantize.block import BlockJob, QuantizedBlock, low_bit_block
from dibit.quantize.fold import copied, fold
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.stats import Need, SiteFailure, Stats
from dibit.quantize.trainer import Data, Schedule, held_out_loss, prepare

logger = logging.getLogger(__name__)

KEYS = ("qkv", "o", "gate_up", "down")
# Segments looked at for the largest inputs, and the least input or weight that a scale is computed from.
RANGE_SEGMENTS = 16
TINY = 1e-5


@dataclass(frozen=True)
class SmoothQuant:
    """Scaling by the largest inputs and weights, then rounding to nearest.

    symmetric  zero points in the middle of the code range
    tries      values of α that are tried for each site, evenly in (0, 1), beside no scaling
    held_out   share of the calibration sequences on which they are compared
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"float_stream"})

    symmetric: bool = False
    tries: int = 9
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ConfigError(f"tries is {self.tries}; it must be at least 1")
        self._schedule()

    def _schedule(self) -> Schedule:
        return Schedule(steps=1, batch=1, held_out=self.held_out)

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        """Raises SiteFailure when the hidden states are not finite."""
        found = search(job, prepare(job, self._schedule()), symmetric=self.symmetric, tries=self.tries)
        return QuantizedBlock.folded(job, found.block, found.weights)


@dataclass(frozen=True)
class Smoothed:
    """A block with scales folded in.

    scales   by site key, [input_width]; what was not worth scaling is left out
    weights  rounded to nearest, by site name
    loss     of the rounded block on the held-out text
    """

    scales: dict[str, Tensor]
    block: Block
    weights: dict[str, QTensor]
    loss: float


@torch.no_grad()
def search(job: BlockJob, data: Data, *, symmetric: bool, tries: int) -> Smoothed:
    """The scales of least loss, site by site. Raises SiteFailure when the hidden states are not finite."""
    chosen = _rounded(job, {}, copied(job.block), data, symmetric=symmetric)
    if not math.isfinite(chosen.loss):
        raise SiteFailure("the hidden states seen during calibration are not finite")
    first, alphas = chosen.loss, []
    for key in KEYS:
        job.tell(f"layers.{job.layer}, scales of {key}")
        found = magnitudes(job, data, key)
        best, alpha = chosen, None
        for tried in (i / (tries + 1) for i in range(1, tries + 1)):
            block, scales = copied(chosen.block), found.scales(tried)
            fold(block, key, scales, stored=job.float_type)
            rounded = _rounded(job, {**chosen.scales, key: scales}, block, data, symmetric=symmetric)
            if rounded.loss < best.loss:
                best, alpha = rounded, tried
        chosen = best
        alphas.append(f"{key} {'none' if alpha is None else f'{alpha:.2g}'}")
    logger.info("layers.%d: loss %.4g from %.4g, α %s", job.layer, chosen.loss, first, ", ".join(alphas))
    return chosen


def _rounded(job: BlockJob, scales: dict[str, Tensor], block: Block, data: Data, *, symmetric: bool) -> Smoothed:
    rtn = RTN(symmetric=symmetric)
    weights = {
        site.name: rtn.quantize(cast(FloatLinear, block.linears[site.key]).weight, job.formats[site.name], Stats())
        for site in job.sites
    }
    low = rounded_inputs(low_bit_block(dataclasses.replace(job, block=block), weights), job.activation_bits)
    return Smoothed(scales, block, weights, held_out_loss(job, low, data))


@dataclass(frozen=True)
class Magnitudes:
    """Largest inputs and largest weights of the channels of a site, those that share a scale together."""

    inputs: Tensor
    weights: Tensor

    def scales(self, alpha: float) -> Tensor:
        """inputs^alpha / weights^(1 - alpha), around 1."""
        scales = self.inputs**alpha / self.weights ** (1 - alpha)
        return scales / (scales.max() * scales.min()).sqrt()


@torch.no_grad()
def magnitudes(job: BlockJob, data: Data, key: str) -> Magnitudes:
    """Of site `key` of the job's block, over the segments to train on; [input_width] each."""
    sizes = job.block.sizes
    linear = cast(FloatLinear, job.block.linears[key])
    probe, largest = copied(job.block), torch.full((linear.weight.shape[1],), TINY)

    def watch(x: Tensor) -> Tensor:
        largest.copy_(torch.maximum(largest, x.abs().amax(dim=tuple(range(x.dim() - 1)))))
        return linear(x)

    probe.linears[key] = watch
    for rows in torch.split(data.training[:RANGE_SEGMENTS], job.batch):
        probe.dense(data.inputs.rows(rows), job.cos, job.sin)
    weight = linear.weight.abs().amax(dim=0).clamp_min(TINY)
    if key == "o":
        heads = (sizes.kv_heads, -1, sizes.head_dim)
        largest, weight = (t.view(heads).amax(dim=1).reshape(-1) for t in (largest, weight))
    return Magnitudes(largest, weight)
