"""One block of the model: site by site, each from what the sites before it, already quantized, pass on.

The order inside a block is that of the computation (qkv, o, gate_up, down), so the statistics of a site include the
errors of everything before it, those of the same block too. A method that works on whole blocks (`BlockMethod`) gets
the block and both streams instead, and none of this happens for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from dibit.engine.errors import CheckpointError
from dibit.engine.models.decoder import Block, FloatLinear, Linear
from dibit.engine.models.spec import LinearSite
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.plan import part_formats
from dibit.quantize.report import SiteReport
from dibit.quantize.stats import HessianSum, Method, Need, SiteFailure, Stats, output_error
from dibit.quantize.streams import HiddenStates

logger = logging.getLogger(__name__)


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
    cos, sin      rotary tables [length, D/2]
    batch         segments that go through the block at a time
    seed          for anything random, together with `layer`
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


@runtime_checkable
class BlockMethod(Protocol):
    """Chooses the integers of a whole block at once."""

    needs: ClassVar[frozenset[Need]]

    @property
    def symmetric(self) -> bool: ...

    def quantize_block(self, job: BlockJob) -> dict[str, QTensor]:
        """A weight for every site, by site name."""
        ...


def quantize_block(
    job: BlockJob, method: Method | BlockMethod, *, name: str, progress: Callable[[str], None]
) -> list[Result]:
    """Quantize every site of the block and put the quantized weights into `job.block`.

    `name` is the method's, for the report; `progress(site name)` is called before each site.
    """
    if isinstance(method, BlockMethod):
        progress(f"layers.{job.layer}")
        begun = time.monotonic()
        found = method.quantize_block(job)
        share = (time.monotonic() - begun) / len(job.sites)
        results = []
        for site in job.sites:
            parts = split(site, found[site.name])
            report = site_report(site, parts, _weight(job.block, site), name=name, seconds=share)
            results.append(Result(parts, report))
        for site, result in zip(job.sites, results, strict=True):
            replace_weight(job.block, site, result.parts)
        return results
    results = []
    for site in job.sites:
        progress(site.name)
        results.append(_quantize_in_place(job, site, method, name))
    return results


def _quantize_in_place(job: BlockJob, site: LinearSite, method: Method, name: str) -> Result:
    begun = time.monotonic()
    stats = collect(job, site) if "hessian" in method.needs else Stats()
    w = _weight(job.block, site)
    parts, fallback = quantize_site(w, site, part_formats(site, job.formats), stats, method)
    report = site_report(site, parts, w, name=name, fallback=fallback, stats=stats, seconds=time.monotonic() - begun)
    replace_weight(job.block, site, parts)
    return Result(parts, report)


def quantize_site(
    w: Tensor, site: LinearSite, formats: Sequence[Format], stats: Stats, method: Method
) -> tuple[tuple[QTensor, ...], str | None]:
    """The parts of `w` float32 [N, K] under `method`, or rounded to nearest and the reason where the method failed.

    formats  one for each part
    Raises CheckpointError when `w` is not finite.
    """
    if not bool(torch.isfinite(w).all()):
        raise CheckpointError(
            f"the weight of {site.name} is not finite (NaN or infinity); the checkpoint is damaged, download it again"
        )
    try:
        parts = _apply(method, w, site, formats, stats)
        if not all(bool(torch.isfinite(part.scales).all()) for part in parts):
            raise SiteFailure("its scales are not finite")
    except SiteFailure as failure:
        logger.warning("%s is rounded to nearest instead: %s", site.name, failure)
        return _apply(RTN(symmetric=method.symmetric), w, site, formats, Stats()), str(failure)
    return parts, None


def _apply(method: Method, w: Tensor, site: LinearSite, formats: Sequence[Format], stats: Stats) -> tuple[QTensor, ...]:
    """Parts of one format go through the method together."""
    if len(set(formats)) == 1:
        return split(site, method.quantize(w, formats[0], stats))
    rows = torch.split(w, [part.n for part in site.parts])
    return tuple(method.quantize(own, chosen, stats) for own, chosen in zip(rows, formats, strict=True))


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
    stats: Stats | None = None,
) -> SiteReport:
    """Errors of the quantized `parts` against `w` [N, K]."""
    delta = _joined(parts) - w
    squared, norm = _squared(delta), _squared(w)
    hessian = stats.hessian if stats is not None else None
    return SiteReport(
        site=site.name,
        format="+".join(dict.fromkeys(part.format.name for part in parts)),
        method=name if fallback is None else "rtn",
        fallback=fallback,
        weight_mse=squared / w.numel(),
        weight_error=squared / norm if norm else math.nan,
        output_error=None if hessian is None else output_error(delta, w, hessian),
        seconds=seconds,
    )


def replace_weight(block: Block, site: LinearSite, parts: Sequence[QTensor]) -> None:
    """From now on the block computes with the quantized weight."""
    linear = cast(FloatLinear, block.linears[site.key])
    block.linears[site.key] = FloatLinear(_joined(parts), linear.bias)


def _joined(parts: Sequence[QTensor]) -> Tensor:
    return torch.cat([dequantize(part) for part in parts])


def advance(stream: HiddenStates, block: Block, cos: Tensor, sin: Tensor, *, batch: int) -> None:
    """Replace the inputs of a block by its outputs."""
    for start, x in stream.batches(batch):
        stream.write(start, block.dense(x, cos, sin))


def collect(job: BlockJob, site: LinearSite) -> Stats:
    """Statistics of the inputs of a site, over the quantized stream."""
    hessian = HessianSum(site.k)
    linear = job.block.linears[site.key]
    job.block.linears[site.key] = cast(Linear, _Tap(hessian))
    try:
        for _, x in job.quantized.batches(job.batch):
            with suppress(_Reached):
                job.block.dense(x, job.cos, job.sin)
    finally:
        job.block.linears[site.key] = linear
    return hessian.stats()


class _Reached(Exception):
    """What follows the tapped site is not computed."""


@dataclass(frozen=True)
class _Tap:
    hessian: HessianSum

    def __call__(self, x: Tensor) -> NoReturn:
        self.hessian.add(x)
        raise _Reached


def _weight(block: Block, site: LinearSite) -> Tensor:
    return cast(FloatLinear, block.linears[site.key]).weight


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
