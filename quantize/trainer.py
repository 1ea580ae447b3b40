"""Trains what a method leaves open in a block, until the block with quantized weights computes what the float one does.

A method is a `Parametrization`: parameters, and a block made of them, weights fake-quantized, in every step. What goes
in are the hidden states that the quantized blocks before it produce; what should come out is what the float block
makes of the float model's. Part of the segments is held out: they choose the state that is kept, the best one seen,
the start included, and tell whether rounding to nearest would have been better.

A step whose loss or gradient is not finite is left out; after several the training begins anew with half the rates,
and after several of those it fails (`TrainingFailure`), with all of it in the report. The order of the segments comes
from the seed and the layer alone, so the same run has the same result.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block
from dibit.quantize.block import BlockJob
from dibit.quantize.precision import check_precision, products
from dibit.quantize.report import TrainingReport, duration
from dibit.quantize.streams import HiddenStates
from dibit.quantize.throughput import matmul_share

logger = logging.getLogger(__name__)

Decay = Literal["cosine", "linear", "none"]

EVALUATIONS = 8
MAX_SKIPPED = 3
MAX_RESTARTS = 2


@dataclass(frozen=True)
class Schedule:
    """How long, on what, and how fast.

    steps       optimizer steps for each block
    batch       segments in a step
    held_out    share of the segments that are not trained on
    decay       course of the rates
    final_rate  share of the rates that is left at the end
    warmup      share of the steps in which the rates rise to their full size
    relative    errors count in proportion to the size of the hidden state of their token
    precision   in which steps multiply matrices: auto, float32 or bfloat16
    """

    steps: int
    batch: int
    held_out: float
    decay: Decay = "cosine"
    final_rate: float = 0.0
    warmup: float = 0.0
    precision: str = "auto"
    relative: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; it is a share of the samples, above 0 and below 1")
        check_precision(self.precision)

    def rate(self, step: int) -> float:
        """Factor on the rates of step 0 <= step < steps."""
        done = step / self.steps
        shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "none": 1.0}[self.decay]
        rising = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        return rising * (self.final_rate + (1 - self.final_rate) * shape)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at one rate."""

    parameters: Sequence[Tensor]
    rate: float


class Parametrization(Protocol):
    """What is trained. `groups` are leaf tensors that require gradients."""

    def groups(self) -> Sequence[Group]: ...

    def block(self) -> Block:
        """The block that the parameters stand for, differentiable in them."""
        ...

    def project(self) -> None:
        """Bring parameters back to where they are allowed to be, after a step, without gradients."""
        ...


class TrainingFailure(Exception):
    """The training met nothing finite; `report` has its course, and the parameters are back at their start."""

    def __init__(self, message: str, report: TrainingReport) -> None:
        super().__init__(message)
        self.report = report


class _Diverged(Exception):
    """Too many steps of this attempt were not finite."""


@dataclass
class _Course:
    """What will be in the report."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    restarts: int = 0
    best_step: int = 0
    tokens: int = 0
    training_s: float = 0.0


@dataclass(frozen=True)
class Data:
    """Inputs and wanted outputs of a block, which segments are for what, and what errors weigh, [samples, length]."""

    inputs: HiddenStates
    targets: HiddenStates
    training: Tensor
    held_out: Tensor
    weights: Tensor

    def loss(self, found: Tensor, rows: Tensor) -> Tensor:
        """Weighted mean squared error of the outputs `found` [B, T, hidden] for these segments."""
        return F.mse_loss(found, self.targets.rows(rows), reduction="none").mean(dim=-1).mul(self.weights[rows]).mean()


@torch.no_grad()
def prepare(job: BlockJob, schedule: Schedule, *, own_inputs: float = 0.0) -> Data:
    """The job's streams, ready for training.

    own_inputs  weight of a second wanted output, what the float block makes of the quantized blocks' hidden states.
                The squared error to two outputs is, up to a constant, that to their mean, so one is kept.
    Raises ConfigError when there are too few segments.
    """
    if job.float_outputs is None:
        raise TypeError("a trained method needs the float stream")
    samples = job.quantized.shape[0]
    held_out = max(1, round(samples * schedule.held_out))
    if samples - held_out < 1:
        raise ConfigError(
            f"{samples} calibration samples leave nothing to train on beside {held_out} held out; "
            "take more (--samples), or a smaller share"
        )
    targets = job.float_outputs
    if own_inputs:
        targets = job.quantized.empty_like()
        both = zip(job.float_outputs.batches(job.batch), job.quantized.batches(job.batch), strict=True)
        for (start, wanted), (_, own) in both:
            targets.write(start, torch.lerp(wanted, job.block.dense(own, job.cos, job.sin), own_inputs))
    rows = torch.arange(samples)
    weights = job.relative_weights if schedule.relative else None
    weights = torch.ones(job.quantized.shape[:2]) if weights is None else weights
    return Data(job.quantized, targets, rows[: samples - held_out], rows[samples - held_out :], weights)


@torch.no_grad()
def held_out_loss(job: BlockJob, block: Block, data: Data) -> float:
    """Weighted mean squared error of the outputs of `block` on the held-out segments."""
    total = 0.0
    for rows in torch.split(data.held_out, job.batch):
        found = block.dense(data.inputs.rows(rows), job.cos, job.sin)
        total += float(data.loss(found, rows)) * rows.numel()
    return total / data.held_out.numel()


def train(
    job: BlockJob,
    parametrization: Parametrization,
    schedule: Schedule,
    data: Data,
    *,
    baseline: float,
    before_step: Callable[[int], None] | None = None,
) -> TrainingReport:
    """Train, and leave the best state in the parameters.

    baseline     noted in the report
    before_step  called with the number of each step, from 0 on, before it is made; 0 comes again after a restart
    Raises TrainingFailure.
    """
    begun = time.monotonic()
    course = _Course()
    parameters = [p for group in parametrization.groups() for p in group.parameters]
    start = [p.detach().clone() for p in parameters]
    while True:
        try:
            _attempt(job, parametrization, schedule, data, course, rate=0.5**course.restarts, before_step=before_step)
            return _report(job, course, baseline, begun)
        except _Diverged as stop:
            _restore(parameters, start)
            again = course.restarts < MAX_RESTARTS
            what = "begins anew at half the rates" if again else "is given up"
            logger.warning("layers.%d: %s; its training %s", job.layer, stop, what)
            course.notes.append(f"{stop}; {what}")
            if not again:
                raise TrainingFailure(f"training failed: {stop}", _report(job, course, baseline, begun)) from stop
            course.restarts += 1
            course.losses.clear()
            course.validation.clear()


def _attempt(
    job: BlockJob,
    parametrization: Parametrization,
    schedule: Schedule,
    data: Data,
    course: _Course,
    *,
    rate: float,
    before_step: Callable[[int], None] | None,
) -> None:
    groups = parametrization.groups()
    parameters = [p for group in groups for p in group.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters), "lr": group.rate * rate} for group in groups],
        weight_decay=0.0,
        fused=True,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    best = held_out_loss(job, _evaluated(parametrization), data)
    if not math.isfinite(best):
        raise _Diverged("the loss is not finite at the start")
    course.validation.append((0, best))
    course.best_step = 0
    best_state = [p.detach().clone() for p in parameters]
    # Adam's steps do not depend on the size of the loss as long as its epsilon is small against the gradients.
    unit = best if best > 0 else 1.0
    order = Order(data.training, job.seed, job.layer)
    skipped, pending = 0, []
    stops = {round(schedule.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)} - {0}
    begun = time.monotonic()
    for step in range(schedule.steps):
        started = time.monotonic()
        if before_step is not None:
            before_step(step)
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * schedule.rate(step)
        rows = order.take(schedule.batch)
        block = parametrization.block()
        with products(schedule.precision):
            found = block.dense(data.inputs.rows(rows), job.cos, job.sin)
        loss = data.loss(found, rows)
        optimizer.zero_grad(set_to_none=True)
        (loss / unit).backward()  # type: ignore[no-untyped-call]
        if _finite(loss, parameters):
            optimizer.step()
            with torch.no_grad():
                parametrization.project()
            pending.append(float(loss.detach()))
        else:
            skipped += 1
            course.skipped += 1
            course.notes.append(f"step {step + 1} left out: loss or gradient not finite")
            logger.warning("layers.%d: step %d left out, its loss or gradient is not finite", job.layer, step + 1)
            if skipped > MAX_SKIPPED:
                raise _Diverged(f"{skipped} steps were not finite")
        course.training_s += time.monotonic() - started
        course.tokens += rows.numel() * data.inputs.shape[1]
        if step + 1 in stops:
            judged = held_out_loss(job, _evaluated(parametrization), data)
            course.validation.append((step + 1, judged))
            if pending:
                course.losses.append((step + 1, math.fsum(pending) / len(pending)))
            pending = []
            if judged < best:
                best, course.best_step = judged, step + 1
                best_state = [p.detach().clone() for p in parameters]
        left_s = (time.monotonic() - begun) / (step + 1) * (schedule.steps - step - 1)
        job.tell(
            f"layers.{job.layer}, step {step + 1} of {schedule.steps}, loss {float(loss.detach()):.2e}, "
            f"held out {best:.2e} (first {course.validation[0][1]:.2e}), "
            f"{course.tokens / course.training_s:.0f} tokens/s, {duration(left_s)} left in this block"
        )
    _restore(parameters, best_state)


class Order:
    """Segments in random order, each once before any comes again."""

    def __init__(self, segments: Tensor, seed: int, layer: int) -> None:
        self._segments = segments
        self._rng = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        self._left = segments[:0]

    def take(self, count: int) -> Tensor:
        while self._left.numel() < count:
            again = self._segments[torch.randperm(self._segments.numel(), generator=self._rng)]
            self._left = torch.cat([self._left, again])
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def _finite(loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """A sum is finite only if all its terms are."""
    return bool(loss.isfinite()) and all(p.grad is None or bool(p.grad.sum().isfinite()) for p in parameters)


@torch.no_grad()
def _evaluated(parametrization: Parametrization) -> Block:
    return parametrization.block()


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], state: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, state, strict=True):
        parameter.copy_(value)


def _report(job: BlockJob, course: _Course, baseline: float, begun: float) -> TrainingReport:
    return TrainingReport(
        steps=course.validation[-1][0] if course.validation else 0,
        losses=tuple(course.losses),
        validation=tuple(course.validation),
        best_step=course.best_step,
        baseline=baseline,
        skipped=course.skipped,
        restarts=course.restarts,
        notes=tuple(course.notes),
        seconds=time.monotonic() - begun,
        tokens_per_s=course.tokens / course.training_s if course.training_s else 0.0,
        # A product forward and two back, two operations for each weight.
        matmul_share=matmul_share(6.0 * sum(s.n * s.k for s in job.sites) * course.tokens, course.training_s),
    )
