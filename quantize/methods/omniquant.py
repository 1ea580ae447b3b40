"""OmniQuant: learn where to clip each group of weights, and scales that make the weights easier to round.

Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao and Luo, "OmniQuant: Omnidirectionally Calibrated Quantization for
Large Language Models", ICLR 2024. Two parts, trained together block by block:

    clipping   the range of a group is [σ(l) min w, σ(u) max w], with a logit u and a logit l of its own
    transform  a scale for every input column of a site, its inverse folded into the norm, the rows of v or the rows
               of up in front (fold.py); only pairs for which the block computes the same, so that the result is an
               ordinary checkpoint: v and o share the scales of a kv head

Where activations are rounded too, the block is trained with the inputs of all its linears rounded as the runtime does
it, and the scales take loud channels of the inputs over into the weights. The paper then also learns scales between q
and k; here q and k are not rounded after RoPE, and a scale on rows that have scales of their own changes no code.

The transform starts as in the paper, (max |x|)^α / (max |w|)^(1-α), or from no scaling, or, where activations are
rounded, from the α that SmoothQuant finds for each site: from what loses least on the held-out text. Clipping starts
from the range of least weight error (rtn.py), which few steps do not reach from the paper's σ = 0.982 at low widths;
`search=false` starts there. Other than in the released code, gradients pass through the zero point, which makes them
exact for weights that are cut off, and scales are trained as logarithms, so that they stay positive without being cut
off. Where rounding to nearest loses less on the held-out text, the block is rounded to nearest. At 2 bits the wanted
output is halfway between that of the float model and what the float block makes of the quantized blocks' hidden states,
the paper's second loss.

The options that matter: `steps`, and with few of them `clip_rate`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.kernels.formats import Format, QTensor, round_scales, zero_fields, zero_points
from dibit.quantize.activations import rounded_inputs
from dibit.quantize.block import BlockJob, QuantizedBlock, low_bit_block, rounded_block
from dibit.quantize.fake_quantize import fake_quantize, straight
from dibit.quantize.fold import copied, fold, input_width
from dibit.quantize.methods.rtn import choose_ranges
from dibit.quantize.methods.smoothquant import magnitudes, search
from dibit.quantize.report import TrainingReport
from dibit.quantize.stats import Need
from dibit.quantize.trainer import Data, Group, Schedule, TrainingFailure, held_out_loss, prepare, train
from dibit.quantize.transforms import Transform

# Of the released code; the largest share of a range that clipping may start from.
FIRST_SHARE = 0.982
LEAST_SHARE = 0.05
# At this many bits the released settings also compare with the float block on the quantized blocks' hidden states.
OWN_INPUTS_BITS = 2
# Values of α that are tried for each site where activations are rounded.
ALPHAS = 9


@dataclass(frozen=True)
class OmniQuant:
    """Learned clipping and equivalent scaling.

    symmetric       zero points in the middle of the code range
    steps           optimizer steps for each block
    batch           calibration sequences in a step
    held_out        share of the calibration sequences that chooses the state to keep
    search          start from the ranges of least weight error instead of nearly the whole ones
    clip_rate       learning rate of the clipping logits
    transform       learn scales at the norms and between v and o
    transform_down  learn scales between up and down too, as is always done where activations are rounded
    transform_rate  learning rate of the logarithms of the scales
    alpha           share of the inputs, against the weights, in the first scales
    relative        errors count in proportion to the size of the hidden state of their token (relative.py)
    precision       in which steps multiply matrices: auto (bfloat16 on CPUs with matrix units), float32 or bfloat16
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"float_stream"})

    symmetric: bool = False
    steps: int = 160
    batch: int = 2
    held_out: float = 0.125
    search: bool = True
    clip_rate: float = 5e-2
    transform: bool = True
    transform_down: bool = False
    transform_rate: float = 5e-3
    alpha: float = 0.5
    relative: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        self.schedule()
        for name in ("clip_rate", "transform_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; it must lie in [0, 1]")
        if self.transform_down and not self.transform:
            raise ConfigError("transform_down adds to transform; it needs transform=true")

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps, self.batch, self.held_out, decay="linear", relative=self.relative, precision=self.precision
        )

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        task = self.prepare(job)
        learned = self.start(task)
        try:
            report = train(job, learned, self.schedule(), task.data, baseline=task.baseline)
        except TrainingFailure as failure:
            return task.failed(failure)
        return task.result(learned, report)

    def prepare(self, job: BlockJob) -> Task:
        low = min(job.formats[site.name].bits for site in job.sites) <= OWN_INPUTS_BITS
        data = prepare(job, self.schedule(), own_inputs=0.5 if low else 0.0)
        rounded = rounded_block(job, symmetric=self.symmetric, reason="")
        nearest = rounded_inputs(low_bit_block(job, rounded.weights), job.activation_bits)
        return Task(job, data, rounded, held_out_loss(job, nearest, data))

    def start(self, task: Task) -> Learned:
        """The one of several first scales that loses least."""
        job, data = task.job, task.data
        if not self.transform:
            return Learned(self, job, {})
        down = self.transform_down or job.activation_bits is not None
        keys = ("qkv", "o", "gate_up", "down")[: 4 if down else 3]
        none = {key: torch.zeros(input_width(job.block.sizes, key)) for key in keys}
        firsts = [none, {key: magnitudes(job, data, key).scales(self.alpha).log() for key in keys}]
        if job.activation_bits is not None:
            found = search(job, data, symmetric=self.symmetric, tries=ALPHAS).scales
            firsts.append({**none, **{key: scales.log() for key, scales in found.items()}})
        tried = [Learned(self, job, scales) for scales in firsts]
        with torch.no_grad():
            losses = [held_out_loss(job, learned.block(), data) for learned in tried]
        order = sorted(range(len(tried)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        return tried[order[0]]


@dataclass(frozen=True)
class Task:
    """A block to be trained.

    rounded   it, rounded to nearest
    baseline  what that loses on the held-out text
    """

    job: BlockJob
    data: Data
    rounded: QuantizedBlock
    baseline: float

    def failed(self, failure: TrainingFailure) -> QuantizedBlock:
        return dataclasses.replace(self.rounded, fallback=str(failure), training=failure.report)

    def result(self, learned: Learned, report: TrainingReport) -> QuantizedBlock:
        """What was learned, or rounding to nearest where that loses less."""
        if min(loss for _, loss in report.validation) > self.baseline:
            reason = "rounding to nearest loses less on the held-out text"
            return dataclasses.replace(self.rounded, fallback=reason, training=report)
        with torch.no_grad():
            block, weights = learned.quantized()
        return QuantizedBlock.folded(self.job, block, weights, training=report)


class Learned:
    """Logits u, l [N, K/G] of every site, the logarithms of the scales, by site key, and other transforms.

    `with_transforms` gives a copy that has more of them, with scales and logits of its own.
    """

    def __init__(
        self, method: OmniQuant, job: BlockJob, scales: dict[str, Tensor], *, transforms: Sequence[Transform] = ()
    ) -> None:
        self._method, self._job, self.transforms = method, job, tuple(transforms)
        self.scales = {key: value.requires_grad_() for key, value in scales.items()}
        self.logits: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            folded = self.folded()
        for site in job.sites:
            first = self._first_shares(
                cast(FloatLinear, folded.linears[site.key]).weight, job.formats[site.name]
            ).logit()
            self.logits[site.key] = first.clone().requires_grad_(), first.requires_grad_()

    def with_transforms(self, transforms: Sequence[Transform]) -> Learned:
        other = copy.copy(self)
        other.transforms = (*self.transforms, *transforms)
        other.scales = {key: _leaf(value) for key, value in self.scales.items()}
        other.logits = {key: (_leaf(upper), _leaf(lower)) for key, (upper, lower) in self.logits.items()}
        return other

    def groups(self) -> Sequence[Group]:
        clipping = Group([t for pair in self.logits.values() for t in pair], self._method.clip_rate)
        scales = Group(list(self.scales.values()), self._method.transform_rate)
        others = [group for transform in self.transforms for group in transform.groups()]
        return [clipping, *([scales] if self.scales else []), *others]

    def block(self) -> Block:
        block = self.folded()
        for site in self._job.sites:
            linear = cast(FloatLinear, block.linears[site.key])
            chosen = self._job.formats[site.name]
            scales, zeros = self._ranges(linear.weight, chosen, site.key)
            block.linears[site.key] = FloatLinear(fake_quantize(linear.weight, scales, zeros, chosen), linear.bias)
        return rounded_inputs(block, self._job.activation_bits)

    def folded(self) -> Block:
        """The float block with its scales and transforms folded in; it computes the same."""
        block = copied(self._job.block)
        for key, logarithms in self.scales.items():
            fold(block, key, logarithms.exp(), stored=self._job.float_type)
        for transform in self.transforms:
            transform.fold(block)
        return block

    def quantized(self) -> tuple[Block, dict[str, QTensor]]:
        """The folded float block, and the weights that `block` computes with, by site name."""
        block = self.folded()
        weights = {}
        for site in self._job.sites:
            w = cast(FloatLinear, block.linears[site.key]).weight
            chosen = self._job.formats[site.name]
            scales, zeros = self._ranges(w, chosen, site.key)
            weights[site.name] = chosen.encode(w, round_scales(scales), zero_fields(zeros, chosen))
        return block, weights

    def project(self) -> None:
        for transform in self.transforms:
            transform.project()

    def _first_shares(self, w: Tensor, format: Format) -> Tensor:
        full, _ = Format(format.bits, format.group_size).ranges(w, symmetric=self._method.symmetric)
        if not self._method.search:
            return torch.full_like(full, FIRST_SHARE)
        best, _ = choose_ranges(w, format, symmetric=self._method.symmetric, search=True)
        return (best / full).clamp(LEAST_SHARE, FIRST_SHARE)

    def _ranges(self, w: Tensor, format: Format, key: str) -> tuple[Tensor, Tensor]:
        """Scales and zero points [N, K/G] of the clipped `w`, whose ranges always include 0."""
        upper, lower = self.logits[key]
        grouped = w.view(*upper.shape, -1)
        hi = grouped.amax(dim=2).clamp_min(0) * upper.sigmoid()
        lo = grouped.amin(dim=2).clamp_max(0) * lower.sigmoid()
        if self._method.symmetric:
            return torch.maximum(hi, -lo) * (2 / format.qmax), torch.full_like(hi, 1 << (format.bits - 1))
        scales = (hi - lo) / format.qmax
        zeros = -lo / straight(scales, round_scales(scales.detach()))
        return scales, straight(zeros, zero_points(zero_fields(zeros.detach(), format), format))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()
