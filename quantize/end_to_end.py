"""Step sizes and norms of a low-bit checkpoint, trained through the whole model.

The second phase of Chen, Shao, Xu, Wang, Zhang, Gao, Zhang, Qiao and Luo, "EfficientQAT: Efficient Quantization-Aware
Training for Large Language Models", ACL 2025: codes and zero points stay, step sizes learn. Here the norms may learn
too, which costs nothing at run time, and what is learned from is by default the float model's prediction of every token
(KL divergence) instead of the one token that came next.

Part of the examples is held out: they choose the state that is kept, the best one seen, the start included. A step
whose loss or gradient is not finite is left out; after several the training begins anew at half the rates, and after
several of those it fails (`TrainingFailure`). A run that was interrupted, however hard, is continued from its last
saved state with the same result to the bit (on the same machine with the same number of threads).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError, DibitError
from dibit.quantize.end_to_end_loss import OBJECTIVES, Objective, Sums, Wanted, predict
from dibit.quantize.end_to_end_model import LowBitModel
from dibit.quantize.end_to_end_state import Course, HeldOut, State, load_state, save_state
from dibit.quantize.end_to_end_teacher import Teacher
from dibit.quantize.instruction import Examples
from dibit.quantize.precision import product_type, products
from dibit.quantize.report import duration
from dibit.quantize.throughput import matmul_share
from dibit.quantize.trainer import EVALUATIONS, MAX_RESTARTS, MAX_SKIPPED, Order, Schedule

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

# Adam (Kingma and Ba, 2015), with its usual constants.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# Seconds between saved states.
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class EndToEnd:
    """How to train.

    objective   kl, the divergence from the float model's predictions; or ce, the cross entropy of the next token
    steps       optimizer steps
    batch       examples in a step
    held_out    share of the examples that chooses the state to keep
    scale_rate  learning rate of the step sizes at 2 bits, in their mean size; half as much with each bit more
    norm_rate   learning rate of the norms, likewise; 0 leaves them as they are
    warmup      share of the steps in which the rates rise from 0
    clip        longest gradient, over all parameters; a longer one is shortened
    precision   in which steps multiply matrices: auto, float32 or bfloat16
    """

    objective: Objective = "kl"
    steps: int = 100
    batch: int = 4
    held_out: float = 0.0625
    scale_rate: float = 1e-2
    norm_rate: float = 5e-3
    warmup: float = 0.03
    clip: float = 1.0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {self.objective!r}; supported: {', '.join(OBJECTIVES)}")
        for name in ("scale_rate", "norm_rate", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.clip <= 0:
            raise ConfigError(f"clip is {self.clip}; it must be above 0")
        self.schedule()

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps, self.batch, self.held_out, decay="cosine", warmup=self.warmup, precision=self.precision
        )


@dataclass(frozen=True)
class EndToEndReport:
    """How the training went.

    settings    as asked for
    source, out  checkpoint that was trained, and the one that was written
    teacher     the float model; None without one
    data        what the examples were made of
    trained     how many numbers were trained
    tokens      that counted, trained on
    losses      of the training batches: (step, mean since the entry before)
    held_out    on the held-out examples, from step 0 on
    best_step   whose state was kept
    skipped     steps whose loss or gradient was not finite
    restarts    times the training began anew at half the rates
    notes       what else happened
    seconds, tokens_per_s  of training, evaluations left out
    matmul_share  of the machine's float32 products per second, what the products of the training come to
    """

    settings: EndToEnd
    source: str
    out: str
    teacher: str | None
    data: dict[str, int | str]
    trained: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[HeldOut, ...]
    best_step: int
    skipped: int
    restarts: int
    notes: tuple[str, ...]
    seconds: float
    tokens_per_s: float
    matmul_share: float

    @property
    def first(self) -> HeldOut:
        return self.held_out[0]

    @property
    def best(self) -> HeldOut:
        return next(point for point in self.held_out if point.step == self.best_step)

    def summary(self) -> str:
        """A few lines for a terminal."""
        return "\n".join(
            [
                f"{self.out}: step {self.best_step} of {self.settings.steps} kept, {self.trained} step sizes and norms "
                f"trained on {self.tokens} tokens, {duration(self.seconds)}, {self.tokens_per_s:.0f} tokens/s",
                *self.held_out_summary(),
            ]
        )

    def held_out_summary(self) -> tuple[str, ...]:
        """What was gained."""
        first, best = self.first, self.best
        line = f"end to end, on held-out text: perplexity {math.exp(first.nll):.3f} -> {math.exp(best.nll):.3f}"
        if first.kl is not None and best.kl is not None:
            line += f", divergence from the float model {first.kl:.4f} -> {best.kl:.4f} nats"
        if first.agreement is not None and best.agreement is not None:
            line += f", same first choice {first.agreement:.1%} -> {best.agreement:.1%}"
        if self.best_step == 0:
            return line, "end-to-end training brought no gain on the held-out text: the checkpoint is as it was"
        return (line,)


class TrainingFailure(DibitError):
    """The training met nothing finite."""


class _Diverged(Exception):
    """Too many steps of this attempt were not finite."""


class EndToEndTraining:
    """A training that can be stopped anywhere. `run` leaves the best state in the model's `values`."""

    def __init__(
        self,
        model: LowBitModel,
        examples: Examples,
        teacher: Teacher | None,
        settings: EndToEnd,
        *,
        seed: int,
        directory: Path,
        save_every_s: float = SAVE_EVERY_S,
        progress: Progress | None = None,
    ) -> None:
        """`directory` holds the state. Raises ConfigError when there are too few examples."""
        self._model, self._examples, self._teacher = model, examples, teacher
        self._settings, self._schedule = settings, settings.schedule()
        self._seed, self._directory, self._save_every_s = seed, directory, save_every_s
        self._progress = progress
        count = examples.tokens.shape[0]
        held_out = max(1, round(count * settings.held_out))
        if count - held_out < 1:
            raise ConfigError(
                f"{count} examples leave nothing to train on beside {held_out} held out; "
                "take more (--samples), or a smaller share"
            )
        rows = torch.arange(count)
        self._training, self._held_out = rows[: count - held_out], rows[count - held_out :]
        rates = torch.empty_like(model.values)
        for slot in model.slots:
            rate = settings.scale_rate if slot.scales else settings.norm_rate
            # A step size moves the outermost weight by half the range times as much; what it may cost shrinks with the
            # distance between two levels.
            rates[slot.start : slot.stop] = rate * 2 ** (2 - slot.bits)
        self._rates = rates
        self._begin = model.values.clone()

    def run(self) -> Course:
        """Raises TrainingFailure."""
        saved = load_state(self._directory)
        state, course = saved if saved is not None else (State.begin(self._begin), Course())
        while True:
            try:
                self._attempt(state, course)
            except _Diverged as stop:
                again = course.restarts < MAX_RESTARTS
                what = "begins anew at half the rates" if again else "is given up"
                logger.warning("end to end: %s; the training %s", stop, what)
                course.notes.append(f"{stop}; it {what}")
                self._model.values.copy_(self._begin)
                if not again:
                    raise TrainingFailure(
                        f"end-to-end training failed {course.restarts + 1} times, the last because {stop}; "
                        "try lower rates (scale_rate, norm_rate), or other text"
                    ) from stop
                state, course = State.begin(self._begin), _anew(course)
                save_state(self._directory, state, course)
                continue
            self._model.values.copy_(state.best)
            return course

    def _attempt(self, state: State, course: Course) -> None:
        steps, stops = self._schedule.steps, self._stops()
        self._model.values.copy_(state.values)
        if not course.held_out:
            course.held_out.append(self.evaluate(step=0))
            if not math.isfinite(course.held_out[0].loss):
                raise _Diverged("the loss is not finite at the start")
            save_state(self._directory, state, course)
        order = Order(self._training, self._seed, 0)
        for _ in range(course.step):
            order.take(self._schedule.batch)
        saved, begun, first = time.monotonic(), time.monotonic(), course.step
        while course.step < steps:
            self._step(state, course, order.take(self._schedule.batch))
            if course.step in stops:
                self._judge(state, course)
            if course.step in stops or time.monotonic() - saved >= self._save_every_s:
                save_state(self._directory, state, course)
                saved = time.monotonic()
            left_s = (time.monotonic() - begun) / (course.step - first) * (steps - course.step)
            self._tell(course, f"about {duration(left_s)} left" if left_s else "")

    def _stops(self) -> set[int]:
        return {round(self._schedule.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)} - {0}

    def _step(self, state: State, course: Course, rows: Tensor) -> None:
        started = time.monotonic()
        model = self._model
        tokens, counted = self._examples.take(rows)
        kept: list[Tensor] = []
        with products(self._schedule.precision):
            x = model.hidden(tokens, keep=kept)
        inner = x[counted]
        head, taught = self._heads
        wanted = self._wanted(rows, tokens, counted, taught)
        sums, grad = predict(model.normed(inner), head, wanted, objective=self._settings.objective)
        assert grad is not None
        whole = torch.zeros_like(x)
        whole[counted] = model.normed_backward(inner, grad)
        del x, inner, grad
        with products(self._schedule.precision):
            model.backward(kept, whole)
        loss, length = sums.loss(self._settings.objective), float(torch.linalg.vector_norm(model.grad))
        if math.isfinite(loss) and math.isfinite(length):
            self._update(state, course, length)
            course.pending.append(loss)
        else:
            course.skipped += 1
            course.skipped_now += 1
            course.notes.append(f"step {course.step + 1} left out: loss or gradient not finite")
            logger.warning("end to end: step %d left out, its loss or gradient is not finite", course.step + 1)
            if course.skipped_now > MAX_SKIPPED:
                raise _Diverged(f"{course.skipped_now} steps were not finite")
        course.step += 1
        course.tokens += sums.tokens
        course.positions += tokens.numel()
        course.training_s += time.monotonic() - started

    def _update(self, state: State, course: Course, length: float) -> None:
        course.updates += 1
        grad = self._model.grad.mul_(min(1.0, self._settings.clip / length) if length else 1.0)
        state.first.lerp_(grad, 1 - BETA1)
        state.second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        rate = self._schedule.rate(course.step) * 0.5**course.restarts / (1 - BETA1**course.updates)
        size = (state.second / (1 - BETA2**course.updates)).sqrt_().add_(EPSILON)
        self._model.values.sub_((state.first / size).mul_(self._rates).mul_(rate))
        self._model.project()
        state.values.copy_(self._model.values)

    def _judge(self, state: State, course: Course) -> None:
        point = self.evaluate(step=course.step)
        if math.isfinite(point.loss) and point.loss < min(p.loss for p in course.held_out):
            course.best_step = point.step
            state.best.copy_(state.values)
        course.held_out.append(point)
        if course.pending:
            course.losses.append((course.step, math.fsum(course.pending) / len(course.pending)))
            course.pending.clear()

    def evaluate(self, *, step: int) -> HeldOut:
        """How the model does on the held-out examples as it is."""
        total = Sums()
        for rows in torch.split(self._held_out, self._schedule.batch):
            tokens, counted = self._examples.take(rows)
            x = self._model.normed(self._model.hidden(tokens)[counted])
            wanted = self._wanted(rows, tokens, counted, None if self._teacher is None else self._teacher.head)
            total += predict(x, self._model.head, wanted, objective=None)[0]
        taught = self._teacher is not None
        return HeldOut(
            step=step,
            loss=total.loss(self._settings.objective),
            kl=total.kl / total.tokens if taught else None,
            nll=total.nll / total.tokens,
            agreement=total.agreed / total.tokens if taught else None,
        )

    @functools.cached_property
    def _heads(self) -> tuple[Tensor, Tensor | None]:
        """The model's head and the teacher's, as steps multiply by them."""
        dtype = product_type(self._schedule.precision)
        own = self._model.head.to(dtype)
        if self._teacher is None:
            return own, None
        same = torch.equal(self._teacher.head, self._model.head)
        return own, own if same else self._teacher.head.to(dtype)

    def _wanted(self, rows: Tensor, tokens: Tensor, counted: Tensor, head: Tensor | None) -> Wanted:
        labels = tokens.roll(-1, dims=1)[counted]
        if self._teacher is None:
            return Wanted(labels, None, None)
        return Wanted(labels, self._teacher.hidden(rows), head)

    def _tell(self, course: Course, note: str) -> None:
        if self._progress is not None:
            self._progress(course.step, self._schedule.steps, note)


def _anew(course: Course) -> Course:
    return Course(
        notes=course.notes,
        skipped=course.skipped,
        restarts=course.restarts + 1,
        tokens=course.tokens,
        positions=course.positions,
        training_s=course.training_s,
    )


def report(
    course: Course,
    settings: EndToEnd,
    *,
    source: str,
    out: str,
    teacher: str | None,
    examples: Examples,
    model: LowBitModel,
) -> EndToEndReport:
    return EndToEndReport(
        settings=settings,
        source=source,
        out=out,
        teacher=teacher,
        data=dict(examples.facts),
        trained=model.values.numel(),
        tokens=course.tokens,
        losses=tuple(course.losses),
        held_out=tuple(course.held_out),
        best_step=course.best_step,
        skipped=course.skipped,
        restarts=course.restarts,
        notes=tuple(course.notes),
        seconds=course.training_s,
        tokens_per_s=course.tokens / course.training_s if course.training_s else 0.0,
        matmul_share=matmul_share(_operations(course, model, taught=teacher is not None), course.training_s),
    )


def _operations(course: Course, model: LowBitModel, *, taught: bool) -> float:
    """In matrix products: blocks forward twice and back, the head forward and back, the teacher's forward."""
    return 8.0 * model.weights * course.positions + (6.0 if taught else 4.0) * model.head.numel() * course.tokens
