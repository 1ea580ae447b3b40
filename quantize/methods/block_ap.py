"""Block-AP: train everything in a block, weights, step sizes, zero points and norms, through the rounding.

The first phase of Chen, Shao, Xu, Wang, Zhang, Gao, Zhang, Qiao and Luo, "EfficientQAT: Efficient Quantization-Aware
Training for Large Language Models", ACL 2025 (its second phase, step sizes of the whole model end to end, is not part
of this method). The gradient takes rounding for the identity (fake_quantize.py); zero points end on the format's grid.

It starts from the codes of GPTQ, corrected for the errors of the blocks before (asymmetric.py), or of rounding to
nearest on searched ranges, where the float weights are the original ones. GPTQ hands over codes and ranges;
the float weight behind a code is then the original one where that lies near it, else the nearest point that does,
well inside the border, so that training begins exactly at GPTQ's result and does not leave it at once. Rates are in
units that hold for any model: those of weights and step sizes in mean step sizes of the site, that of zero points in
codes, that of norms in their mean size.

Training all weights on little text fits that text: take at least 256 sequences of 512 tokens. Where the held-out text
shows no gain, the start is what is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import LinearSite
from dibit.kernels.formats import QTensor, concat_rows, round_scales, zero_fields, zero_points
from dibit.quantize.block import BlockJob, QuantizedBlock, low_bit_block, quantize_block, rounded_block
from dibit.quantize.fake_quantize import fake_quantize, straight
from dibit.quantize.fold import copied
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.stats import Method, Need
from dibit.quantize.streams import HiddenStates
from dibit.quantize.trainer import Group, Schedule, TrainingFailure, held_out_loss, prepare, train

STARTS = ("gptq", "rtn")
# How far from the middle of its GPTQ code, in step sizes, a weight may start; 0.5 is the border. Nearer to it, the
# first few steps flip so many codes that GPTQ's result is lost before training gains anything.
INSIDE = 0.3
LEAST_SCALE = 0.05
# Shares of the codes that are final in each part of the last steps.
SETTLED = (0.5, 0.75, 0.9, 0.97, 1.0)


@dataclass(frozen=True)
class BlockAP:
    """Block-wise training of all parameters.

    symmetric    zero points in the middle of the code range, where they stay
    start        first codes and ranges: gptq or rtn
    start_samples  calibration sequences that gptq looks at, so many at most
    steps        optimizer steps for each block; 0 leaves the first codes
    batch        calibration sequences in a step
    held_out     share of the calibration sequences that chooses the state to keep
    weight_rate  learning rate of the weights, in mean step sizes of their site
    scale_rate   learning rate of the step sizes, in the same unit
    zero_rate    learning rate of the zero points, in codes
    norm_rate    learning rate of the norms, in their mean size; 0 leaves them as they are
    settle       share of the steps, the last ones, in which codes become final: half of them at first, those farthest
                 from a rounding border, all of them before the last fifth; 0 lets all codes change to the end
    relative     errors count in proportion to the size of the hidden state of their token (relative.py)
    precision    in which steps multiply matrices: auto (bfloat16 on CPUs with matrix units), float32 or bfloat16
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"float_stream"})

    symmetric: bool = False
    start: str = "gptq"
    start_samples: int = 64
    steps: int = 128
    batch: int = 4
    held_out: float = 0.0625
    weight_rate: float = 1e-3
    scale_rate: float = 2e-3
    zero_rate: float = 2e-3
    norm_rate: float = 1e-3
    settle: float = 0.0
    relative: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps is {self.steps}; it must be at least 0")
        self.schedule()
        if self.start not in STARTS:
            raise ConfigError(f"start is {self.start!r}; supported: {', '.join(STARTS)}")
        if self.start_samples < 2:
            raise ConfigError(f"start_samples is {self.start_samples}; it must be at least 2")
        for name in ("weight_rate", "scale_rate", "zero_rate", "norm_rate", "settle"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")

    def schedule(self) -> Schedule:
        return Schedule(
            max(1, self.steps),
            self.batch,
            self.held_out,
            decay="cosine",
            final_rate=0.05,
            relative=self.relative,
            precision=self.precision,
        )

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        if not self.steps:
            first, notes = self._first(job)
            return QuantizedBlock(first, method=self.start, fallback="; ".join(notes) or None)
        data = prepare(job, self.schedule())
        rounded = rounded_block(job, symmetric=self.symmetric, reason="")
        baseline = held_out_loss(job, low_bit_block(job, rounded.weights), data)
        first, notes = self._first(job)
        learned = Learned(self, job, first)
        try:
            report = train(
                job,
                learned,
                self.schedule(),
                data,
                baseline=baseline,
                before_step=learned.settle if self.settle else None,
            )
        except TrainingFailure as failure:
            course = dataclasses.replace(failure.report, notes=(*notes, *failure.report.notes))
            return QuantizedBlock(first, method=self.start, fallback=str(failure), training=course)
        report = dataclasses.replace(report, notes=(*notes, *report.notes))
        if min(loss for _, loss in report.validation) > baseline:
            reason = "rounding to nearest loses less on the held-out text"
            return dataclasses.replace(rounded, fallback=reason, training=report)
        with torch.no_grad():
            norms = learned.norms()
            return QuantizedBlock(learned.quantized(), norms["attn_norm"], norms["mlp_norm"], training=report)

    def _first(self, job: BlockJob) -> tuple[dict[str, QTensor], tuple[str, ...]]:
        """First codes by site name, and what is to be noted about them."""
        job.tell(f"layers.{job.layer}, first codes")
        start: Method = RTN(symmetric=self.symmetric, range_search=True)
        if self.start == "gptq":
            start = GPTQ(symmetric=self.symmetric, asymmetric=True, relative=self.relative)
        # Second-order statistics need far less text than training does, and several passes over it.
        first = partial(_first, count=self.start_samples)
        apart = dataclasses.replace(
            job,
            block=copied(job.block),
            quantized=job.quantized.first(self.start_samples),
            float_stream=first(job.float_stream),
            float_outputs=first(job.float_outputs),
        )
        found = quantize_block(apart, start, name=self.start, progress=lambda site: None).sites
        weights = {site.name: concat_rows(list(one.parts)) for site, one in zip(job.sites, found, strict=True)}
        failed = [one.report for one in found if one.report.fallback is not None]
        return weights, tuple(f"{report.site} starts from rtn: {report.fallback}" for report in failed)


@dataclass(frozen=True)
class _Site:
    """weight [N, K], scales and zeros [N, K/G]; step is the mean scale at the start, least the smallest allowed."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    step: float
    least: Tensor


class Learned:
    """Weights, scales and zero points of every site, by its key, and the two norms."""

    def __init__(self, method: BlockAP, job: BlockJob, first: Mapping[str, QTensor]) -> None:
        self._method, self._job = method, job
        inside = None if method.start == "rtn" else INSIDE
        self._sites = {
            site.key: _begun(cast(FloatLinear, job.block.linears[site.key]).weight, first[site.name], inside)
            for site in job.sites
        }
        own = {"attn_norm": job.block.attn_norm, "mlp_norm": job.block.mlp_norm}
        self._settled: dict[str, tuple[Tensor, Tensor]] = {}
        self._norms = {name: norm.clone().requires_grad_(method.norm_rate > 0) for name, norm in own.items()}

    def groups(self) -> Sequence[Group]:
        method, groups = self._method, []
        for site in self._sites.values():
            groups.append(Group([site.weight], method.weight_rate * site.step))
            groups.append(Group([site.scales], method.scale_rate * site.step))
            if not method.symmetric:
                groups.append(Group([site.zeros], method.zero_rate))
        if method.norm_rate:
            groups += [
                Group([norm], method.norm_rate * float(norm.detach().abs().mean())) for norm in self._norms.values()
            ]
        return groups

    def block(self) -> Block:
        block = copied(self._job.block)
        for site in self._job.sites:
            linear, own = cast(FloatLinear, block.linears[site.key]), self._sites[site.key]
            settled, _ = self._settled.get(site.key, (None, None))
            w = fake_quantize(own.weight, own.scales, own.zeros, self._job.formats[site.name], settled=settled)
            block.linears[site.key] = FloatLinear(w, linear.bias)
        for name, norm in self.norms().items():
            if norm is not None:
                setattr(block, name, norm)
        return block

    def norms(self) -> dict[str, Tensor | None]:
        """The norms as they will be stored, differentiable; None where they are not trained."""
        if not self._method.norm_rate:
            return dict.fromkeys(self._norms)
        dtype = self._job.float_type
        return {name: straight(norm, norm.detach().to(dtype).float()) for name, norm in self._norms.items()}

    def project(self) -> None:
        for site in self._job.sites:
            own = self._sites[site.key]
            own.scales.copy_(torch.maximum(own.scales, own.least))
            own.zeros.clamp_(*self._job.formats[site.name].zero_range)
            if site.key in self._settled:
                self._center(site)

    @torch.no_grad()
    def settle(self, step: int) -> None:
        """Make those codes final that are due before `step`."""
        if step == 0:
            self._settled.clear()
        method = self._method
        last = max(1, round(method.settle * method.steps))
        due = {method.steps - last + last * i // len(SETTLED): share for i, share in enumerate(SETTLED)}
        if step in due:
            for site in self._job.sites:
                self._settled[site.key] = self._final(site, due[step])
                self._center(site)

    def _final(self, site: LinearSite, share: float) -> tuple[Tensor, Tensor]:
        """Which weights are settled [N, K], and codes [N, K/G, G] of all of them as they are now."""
        own, form = self._sites[site.key], self._job.formats[site.name]
        scales, z = round_scales(own.scales)[..., None], zero_points(zero_fields(own.zeros, form), form)[..., None]
        place = own.weight.view(*own.scales.shape, -1) / scales + z
        codes = form.encode(own.weight, scales[..., 0], zero_fields(own.zeros, form)).codes.view(place.shape).float()
        # Beyond the range there is no border to be near to: such a weight is far inside its code.
        distance = (place.clamp_(0, form.qmax) - codes).abs_().view(own.weight.shape)
        before = self._settled.get(site.key)
        if before is not None:
            # What is final stays so.
            distance[before[0]] = -1.0
        count = max(1, round(share * distance.numel()))
        return distance <= distance.flatten().kthvalue(count).values, codes

    def _center(self, site: LinearSite) -> None:
        """Settled weights lie in the middle of their codes, wherever step sizes and zero points go."""
        own, form = self._sites[site.key], self._job.formats[site.name]
        settled, codes = self._settled[site.key]
        scales, z = round_scales(own.scales)[..., None], zero_points(zero_fields(own.zeros, form), form)[..., None]
        own.weight.copy_(torch.where(settled, ((codes - z) * scales).view(own.weight.shape), own.weight))

    def quantized(self) -> dict[str, QTensor]:
        """The weights that `block` computes with, by site name."""
        weights = {}
        for site in self._job.sites:
            own = self._sites[site.key]
            form = self._job.formats[site.name]
            weights[site.name] = form.encode(own.weight, round_scales(own.scales), zero_fields(own.zeros, form))
        return weights


def _first(stream: HiddenStates | None, count: int) -> HiddenStates | None:
    return None if stream is None else stream.first(count)


def _begun(w: Tensor, first: QTensor, inside: float | None) -> _Site:
    """`w` itself, or no further than `inside` steps from its codes in `first`."""
    scales, zeros = first.scales.float(), zero_points(first.zeros, first.format)
    weight = w.clone()
    if inside is not None:
        groups = (*scales.shape, -1)
        levels = first.codes.float().view(groups) - zeros[..., None]
        offset = (w.view(groups) / scales[..., None] - levels).clamp_(-inside, inside)
        weight = ((levels + offset) * scales[..., None]).view(w.shape)
    return _Site(
        weight.requires_grad_(),
        scales.clone().requires_grad_(),
        zeros.requires_grad_(),
        float(scales.mean()),
        scales * LEAST_SCALE,
    )
