"""One block of the model: site by site, each from what the sites before it, already quantized, pass on.

The order inside a block is that of the computation (qkv, o, gate_up, down), so the statistics of a site include the
errors of everything before it, those of the same block too. A method that works on whole blocks (`BlockMethod`) gets
the block and both streams instead, and none of this happens for it.

A block method may also change the block's other floats, its two norms and the biases of its sites: it returns them in
`QuantizedBlock` beside the weights. They are rounded to `BlockJob.float_type`, the type in which the source stores its
norms and biases, before anything else sees them (float32 where that type cannot hold a value), written in place of
the source's, and read back when a run is continued. A method that folds scales into a norm takes the rounding into
account by folding for that type (fold.py): the scale that is left after it goes into the columns.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from dibit.engine.errors import CheckpointError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.quantize.activations import rounded_inputs
from dibit.quantize.collect import collect
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.plan import part_formats
from dibit.quantize.relative import relative_weights
from dibit.quantize.report import PartReport, SiteReport, TrainingReport
from dibit.quantize.stats import Method, Need, SiteFailure, Stats, output_error
from dibit.quantize.streams import HiddenStates

logger = logging.getLogger(__name__)


def _silent(note: str) -> None:
    pass


@dataclass(frozen=True)
class Result:
    """A quantized site, one weight for each of its parts, and its errors."""

    parts: tuple[QTensor, ...]
    report: SiteReport


@dataclass(frozen=True)
class BlockJob:
    """What there is to know when a block is to be quantized. Nothing in it is the method's to change.

    layer         its number
    block         its weights as floats
    sites         its linears, in order of computation
    formats       by site name; by module name where the parts of a site differ, which only a `Method` is given
    quantized     hidden states that the quantized blocks before it produce
    float_stream  those of the float model; None unless the method needs them
    float_outputs  what the float block makes of them; None without them
    token_weights  how much an error at a token costs the model (fisher.py), by module name [samples, length], 1 on
                  average; under "layers.N" that of the block's output; None unless the method needs them
    cos, sin      rotary tables [length, D/2]
    batch         segments that go through the block at a time
    seed          for anything random, together with `layer`
    float_type    type in which changed norms and biases will be stored
    activation_bits  width to which the served model rounds the inputs of its quantized linears, a token at a time
                  (kernels.qlinear.quantize_activations); None: weights only
    tell          takes a note on how far it is, for whoever is watching
    """

    layer: int
    block: Block
    sites: tuple[LinearSite, ...]
    formats: Mapping[str, Format]
    quantized: HiddenStates
    float_stream: HiddenStates | None
    cos: Tensor
    sin: Tensor
    batch: int
    seed: int
    float_type: torch.dtype = torch.float32
    activation_bits: int | None = None
    tell: Callable[[str], None] = _silent
    token_weights: Mapping[str, Tensor] | None = None
    float_outputs: HiddenStates | None = None

    @functools.cached_property
    def relative_weights(self) -> Tensor | None:
        """What an error at a token is worth [samples, length] (relative.py); None without a float stream."""
        return None if self.float_outputs is None else relative_weights(self.float_outputs)


@dataclass(frozen=True)
class QuantizedBlock:
    """What a method over whole blocks came to.

    weights    of every site, by site name
    attn_norm, mlp_norm  new norms [hidden]; None: as they were
    biases     new biases [N] by site name, where they changed
    floats     float weights by site name that the weights were chosen for, where folding changed them: for the report
    method     the method that chose the weights, where that is not the one asked for, and
    fallback   the reason; None otherwise
    training   how the training went; None without any
    """

    weights: Mapping[str, QTensor]
    attn_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    floats: Mapping[str, Tensor] = field(default_factory=dict)
    method: str | None = None
    fallback: str | None = None
    training: TrainingReport | None = None

    @classmethod
    def folded(cls, job: BlockJob, block: Block, weights: Mapping[str, QTensor], **facts: Any) -> QuantizedBlock:
        """With the norms, biases and float weights of `block`, a changed copy of the job's, and others as `facts`."""
        biases = {}
        for site in job.sites:
            bias = cast(FloatLinear, block.linears[site.key]).bias
            if bias is not None and bias is not cast(FloatLinear, job.block.linears[site.key]).bias:
                biases[site.name] = bias
        floats = {site.name: _weight(block, site) for site in job.sites}
        norms = [
            None if new is old else new
            for new, old in ((block.attn_norm, job.block.attn_norm), (block.mlp_norm, job.block.mlp_norm))
        ]
        return cls(weights, norms[0], norms[1], biases, floats, **facts)


@runtime_checkable
class BlockMethod(Protocol):
    """Chooses the integers of a whole block at once."""

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def symmetric(self) -> bool: ...

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        """Raises SiteFailure; the block is then rounded to nearest as a whole, and the report says so."""
        ...


@runtime_checkable
class Rearranging(Protocol):
    """A `Method` that rounds other weights than the job's, of a block that computes the same."""

    def rearranged(self, job: BlockJob) -> Block: ...


@dataclass(frozen=True)
class Results:
    """A quantized block: its sites, the names of its floats that changed (as in `Changed`), and the training."""

    sites: list[Result]
    changed: Changed
    training: TrainingReport | None = None


@dataclass(frozen=True)
class Changed:
    """Floats of a block that differ from the source's: by "attn_norm" and "mlp_norm", and by site name for biases."""

    norms: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def put(self, block: Block, sites: Sequence[LinearSite]) -> None:
        """From now on the block computes with them."""
        for name, norm in self.norms.items():
            setattr(block, name, norm.float())
        for site in sites:
            if site.name in self.biases:
                linear = cast(FloatLinear, block.linears[site.key])
                block.linears[site.key] = FloatLinear(linear.weight, self.biases[site.name].float())


def quantize_block(
    job: BlockJob, method: Method | BlockMethod, *, name: str, progress: Callable[[str], None]
) -> Results:
    """Quantize every site of the block and put the quantized weights into `job.block`.

    `name` is the method's, for the report; `progress(site name)` is called before each site. Raises CheckpointError
    when a weight is not finite.
    """
    if isinstance(method, BlockMethod):
        progress(f"layers.{job.layer}")
        return _quantize_whole(job, method, name)
    own, changed = job.block, Changed()
    if isinstance(method, Rearranging):
        block = method.rearranged(job)
        changed = _changed(job, QuantizedBlock.folded(job, block, {}))
        own.linears.update(block.linears)
        changed.put(own, job.sites)
    floats = own.with_linears(dict(own.linears))
    results = []
    for site in job.sites:
        progress(site.name)
        results.append(_quantize_in_place(job, site, floats, method, name))
    return Results(results, changed)


def _quantize_whole(job: BlockJob, method: BlockMethod, name: str) -> Results:
    begun = time.monotonic()
    for site in job.sites:
        _check_finite(_weight(job.block, site), site)
    try:
        found = method.quantize_block(job)
        _check_scales(found.weights.values())
        changed = _changed(job, found)
    except SiteFailure as failure:
        logger.warning("layers.%d is rounded to nearest instead: %s", job.layer, failure)
        found, changed = rounded_block(job, symmetric=method.symmetric, reason=str(failure)), Changed()
    share = (time.monotonic() - begun) / len(job.sites)
    results = []
    for site in job.sites:
        parts = split(site, found.weights[site.name])
        w = found.floats.get(site.name, _weight(job.block, site))
        report = site_report(site, parts, w, name=found.method or name, seconds=share, fallback=found.fallback)
        results.append(Result(parts, report))
    changed.put(job.block, job.sites)
    for site, result in zip(job.sites, results, strict=True):
        replace_weight(job.block, site, result.parts)
    return Results(results, changed, found.training)


def rounded_block(job: BlockJob, *, symmetric: bool, reason: str) -> QuantizedBlock:
    """The block rounded to nearest, because of `reason`."""
    rtn = RTN(symmetric=symmetric)
    weights = {site.name: rtn.quantize(_weight(job.block, site), job.formats[site.name], Stats()) for site in job.sites}
    return QuantizedBlock(weights, method="rtn", fallback=reason)


def low_bit_block(job: BlockJob, weights: Mapping[str, QTensor]) -> Block:
    """The job's block computing with `weights`, by site name."""
    own = job.block
    block = own.with_linears(dict(own.linears))
    for site in job.sites:
        replace_weight(block, site, split(site, weights[site.name]))
    return block


def _changed(job: BlockJob, found: QuantizedBlock) -> Changed:
    norms = {"attn_norm": found.attn_norm, "mlp_norm": found.mlp_norm}
    return Changed(
        {name: _stored(norm, job.float_type) for name, norm in norms.items() if norm is not None},
        {name: _stored(bias, job.float_type) for name, bias in found.biases.items()},
    )


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not bool(x.isfinite().all()):
        raise SiteFailure("a norm or bias is not finite")
    rounded = x.detach().to(dtype)
    return rounded if bool(rounded.isfinite().all()) else x.detach().float()


def _check_finite(w: Tensor, site: LinearSite) -> None:
    if not bool(torch.isfinite(w).all()):
        raise CheckpointError(
            f"the weight of {site.name} is not finite (NaN or infinity); the checkpoint is damaged, download it again"
        )


def _check_scales(weights: Iterable[QTensor]) -> None:
    if not all(bool(torch.isfinite(w.scales).all()) for w in weights):
        raise SiteFailure("its scales are not finite")


def _quantize_in_place(job: BlockJob, site: LinearSite, floats: Block, method: Method, name: str) -> Result:
    begun = time.monotonic()
    stats = _statistics(job, site, floats, method.needs)
    w = _weight(job.block, site)
    parts, fallback = quantize_site(w, site, part_formats(site, job.formats), stats, method)
    used = name if fallback is None else "rtn"
    report = site_report(site, parts, w, name=used, fallback=fallback, stats=stats, seconds=time.monotonic() - begun)
    replace_weight(job.block, site, parts)
    return Result(parts, report)


def _statistics(job: BlockJob, site: LinearSite, floats: Block, needs: frozenset[Need]) -> tuple[Stats, ...]:
    if "hessian" not in needs:
        return (Stats(),)
    both = (floats, job.float_stream) if "cross" in needs and job.float_stream is not None else None
    weights = job.token_weights if "token_weights" in needs else None
    shared = job.relative_weights if "relative" in needs else None
    low = rounded_inputs(job.block, job.activation_bits)
    return collect(
        site, low, job.quantized, job.cos, job.sin, batch=job.batch, floats=both, weights=weights, shared_weights=shared
    )


def quantize_site(
    w: Tensor, site: LinearSite, formats: Sequence[Format], stats: Sequence[Stats], method: Method
) -> tuple[tuple[QTensor, ...], str | None]:
    """The parts of `w` float32 [N, K] under `method`, or rounded to nearest and the reason where the method failed.

    formats  one for each part
    stats    one for each part, or one for all
    Raises CheckpointError when `w` is not finite.
    """
    _check_finite(w, site)
    try:
        parts = _apply(method, w, site, formats, stats)
        _check_scales(parts)
    except SiteFailure as failure:
        logger.warning("%s is rounded to nearest instead: %s", site.name, failure)
        return _apply(RTN(symmetric=method.symmetric), w, site, formats, (Stats(),)), str(failure)
    return parts, None


def _apply(
    method: Method, w: Tensor, site: LinearSite, formats: Sequence[Format], stats: Sequence[Stats]
) -> tuple[QTensor, ...]:
    """Parts of one format and with the same statistics go through the method together."""
    if len(set(formats)) == 1 and len(stats) == 1:
        return split(site, method.quantize(w, formats[0], stats[0]))
    own = stats if len(stats) > 1 else [stats[0]] * len(formats)
    return tuple(map(method.quantize, _rows(w, site), formats, own))


def split(site: LinearSite, whole: QTensor) -> tuple[QTensor, ...]:
    """The weight of a site as one for each part (views)."""
    parts = []
    start = 0
    for part in site.parts:
        parts.append(whole.rows(start, start + part.n))
        start += part.n
    return tuple(parts)


def site_report(
    site: LinearSite,
    parts: Sequence[QTensor],
    w: Tensor,
    *,
    name: str,
    seconds: float,
    fallback: str | None = None,
    stats: Sequence[Stats] = (),
) -> SiteReport:
    """Errors of the quantized `parts` against `w` [N, K]; `name` is the method that chose them."""
    delta = _joined(parts) - w
    squared, norm = _squared(delta), _squared(w)
    return SiteReport(
        site=site.name,
        format="+".join(dict.fromkeys(part.format.name for part in parts)),
        method=name,
        fallback=fallback,
        weight_mse=squared / w.numel(),
        weight_error=squared / norm if norm else math.nan,
        output_error=_output_error(delta, w, site, stats),
        seconds=seconds,
        parts=tuple(map(_part_report, site.parts, parts, _rows(w, site), _rows(delta, site))),
    )


def _output_error(delta: Tensor, w: Tensor, site: LinearSite, stats: Sequence[Stats]) -> float | None:
    hessians = [own.everything().hessian for own in stats]
    known = [hessian for hessian in hessians if hessian is not None]
    if not known:
        return None
    if len(known) == 1:
        return output_error([delta], [w], known)
    return output_error(_rows(delta, site), _rows(w, site), known)


def _part_report(part: Part, quantized: QTensor, w: Tensor, delta: Tensor) -> PartReport:
    norm = _squared(w)
    error = _squared(delta) / norm if norm else math.nan
    return PartReport(part.module, quantized.format.name, w.shape[0], w.shape[1], error)


def _rows(w: Tensor, site: LinearSite) -> tuple[Tensor, ...]:
    return torch.split(w, [part.n for part in site.parts])


def replace_weight(block: Block, site: LinearSite, parts: Sequence[QTensor]) -> None:
    """From now on the block computes with the quantized weight."""
    linear = cast(FloatLinear, block.linears[site.key])
    block.linears[site.key] = FloatLinear(_joined(parts), linear.bias)


def _joined(parts: Sequence[QTensor]) -> Tensor:
    return torch.cat([dequantize(part) for part in parts])


def _weight(block: Block, site: LinearSite) -> Tensor:
    return cast(FloatLinear, block.linears[site.key]).weight


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
