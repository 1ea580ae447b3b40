"""The trainer: losses fall, the best state is kept, steps that are not finite are left out or end it; all is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from random_blocks import KEYS, random_block, sizes
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import Format
from dibit.quantize.block import BlockJob
from dibit.quantize.fold import copied
from dibit.quantize.streams import HiddenStates, StreamConfig, advance
from dibit.quantize.trainer import Group, Schedule, TrainingFailure, held_out_loss, prepare, train

SAMPLES, LENGTH = 10, 12


def stream(hidden: int, noise: float, directory: Path) -> HiddenStates:
    found = HiddenStates(SAMPLES, LENGTH, hidden, config=StreamConfig(), directory=directory)
    rng = torch.Generator().manual_seed(1)
    states, other = (torch.randn(SAMPLES, LENGTH, hidden, generator=rng) for _ in range(2))
    found.write(0, states + noise * other)
    return found


def make_job(directory: Path, *, seed: int = 0) -> BlockJob:
    block = random_block(sizes(6, 2))
    sites = []
    for key in KEYS:
        linear: Any = block.linears[key]
        n, k = linear.weight.shape
        sites.append(LinearSite(f"layers.3.{key}", (Part(key, n),), n, k, "x", bias=True))
    cos, sin = block.sizes.rope.tables(LENGTH)
    float_stream = stream(block.sizes.hidden, 0.0, directory)
    outputs = float_stream.empty_like()
    advance(float_stream, block, cos, sin, batch=4, into=outputs)
    return BlockJob(
        layer=3,
        block=block,
        sites=tuple(sites),
        formats={site.name: Format(3, 16) for site in sites},
        quantized=stream(block.sizes.hidden, 0.1, directory),
        float_stream=float_stream,
        float_outputs=outputs,
        cos=cos,
        sin=sin,
        batch=4,
        seed=seed,
    )


class Gains:
    """A gain on the outputs of "down", 0 at first; `spoil(call)` replaces it for a call of `block`."""

    def __init__(
        self, job: BlockJob, *, rate: float = 0.05, spoil: Callable[[int, Tensor], Tensor] | None = None
    ) -> None:
        self._job, self._rate, self._spoil = job, rate, spoil
        self.gain = torch.zeros(job.block.sizes.hidden).requires_grad_()
        self.calls = 0
        self.projected = 0

    def groups(self) -> Sequence[Group]:
        return [Group([self.gain], self._rate)]

    def block(self) -> Block:
        self.calls += 1
        gain = self.gain if self._spoil is None else self._spoil(self.calls, self.gain)
        block = copied(self._job.block)
        linear: Any = block.linears["down"]
        block.linears["down"] = FloatLinear(linear.weight * gain[:, None], linear.bias * gain)
        return block

    def project(self) -> None:
        self.projected += 1


SCHEDULE = Schedule(steps=16, batch=3, held_out=0.2)


def test_losses_fall_and_the_same_run_has_the_same_result(tmp_path: Path) -> None:
    reports, states = [], []
    for seed in (0, 0, 1):
        job = make_job(tmp_path, seed=seed)
        learned = Gains(job)
        data = prepare(job, SCHEDULE)
        report = train(job, learned, SCHEDULE, data, baseline=7.0)
        assert float(held_out_loss(job, learned.block(), data)) == min(loss for _, loss in report.validation)
        reports.append(report)
        states.append(learned.gain.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    report = reports[0]
    assert report.validation == reports[1].validation
    assert report.losses[-1][1] < report.losses[0][1]
    assert report.validation[-1][1] < 0.8 * report.validation[0][1]
    assert [step for step, _ in report.validation] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert (report.steps, report.best_step, report.skipped, report.restarts, report.baseline) == (16, 16, 0, 0, 7.0)
    assert report.tokens_per_s > 0


def test_held_out_segments_are_not_trained_on_and_the_others_all_are(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    data = prepare(job, Schedule(steps=1, batch=8, held_out=0.2))
    assert data.held_out.tolist() == [8, 9]
    learned, again = Gains(job), Gains(job)
    train(job, learned, Schedule(steps=1, batch=8, held_out=0.2), data, baseline=1.0)
    job.quantized.write(8, torch.full((2, LENGTH, job.block.sizes.hidden), 3.0))
    train(job, again, Schedule(steps=1, batch=8, held_out=0.2), prepare(job, SCHEDULE), baseline=1.0)
    # The order of a batch changes nothing but the last bits, and a batch of 8 holds every training segment.
    torch.testing.assert_close(learned.gain, again.gain, rtol=0.01, atol=1e-4)
    with pytest.raises(ConfigError, match="nothing to train on"):
        prepare(job, Schedule(steps=1, batch=1, held_out=0.99))


def test_the_best_state_is_kept_even_the_start(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    learned = Gains(job, rate=50.0)
    report = train(job, learned, SCHEDULE, prepare(job, SCHEDULE), baseline=1.0)
    assert report.best_step == 0
    assert report.validation[-1][1] > report.validation[0][1]
    assert not bool(learned.gain.detach().any())


def test_the_second_output_is_that_of_the_float_block_on_the_same_inputs(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert job.float_stream is not None
    every = torch.arange(SAMPLES)
    outputs = [job.block.dense(s.rows(every), job.cos, job.sin) for s in (job.float_stream, job.quantized)]
    torch.testing.assert_close(prepare(job, SCHEDULE).targets.rows(every), outputs[0])
    mixed = prepare(job, SCHEDULE, own_inputs=0.25).targets.rows(every)
    torch.testing.assert_close(mixed, 0.75 * outputs[0] + 0.25 * outputs[1])


def nan_at(*calls: int) -> Callable[[int, Tensor], Tensor]:
    return lambda call, gain: gain * float("nan") if call in calls else gain


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job(tmp_path)
    # The first call is the evaluation before any step.
    learned = Gains(job, spoil=nan_at(3))
    report = train(job, learned, SCHEDULE, prepare(job, SCHEDULE), baseline=1.0)
    assert (report.skipped, report.restarts) == (1, 0)
    assert learned.projected == 15
    assert bool(learned.gain.isfinite().all())
    assert "step 2 left out" in report.notes[0]
    assert "layers.3: step 2 left out" in caplog.text


def test_after_many_the_training_begins_anew_at_half_the_rates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path)
    # One step, then four that are not finite, and an evaluation in between.
    report = train(
        job, learned := Gains(job, spoil=nan_at(3, 5, 6, 8)), SCHEDULE, data := prepare(job, SCHEDULE), baseline=1.0
    )
    assert (report.skipped, report.restarts) == (4, 1)
    assert "begins anew at half the rates" in report.notes[-1]
    assert "begins anew at half the rates" in caplog.text
    train(job, half := Gains(job, rate=0.025), SCHEDULE, data, baseline=1.0)
    assert torch.equal(learned.gain, half.gain)
    assert len(report.validation) == 9


def test_in_the_end_it_fails_with_its_course(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    learned = Gains(
        job, spoil=lambda call, gain: gain * float("nan") if gain.requires_grad and torch.is_grad_enabled() else gain
    )
    with pytest.raises(TrainingFailure, match="4 steps were not finite") as failure:
        train(job, learned, SCHEDULE, prepare(job, SCHEDULE), baseline=1.0)
    report = failure.value.report
    assert (report.restarts, report.skipped) == (2, 12)
    assert "given up" in report.notes[-1]
    assert not bool(learned.gain.detach().any())


def test_rates_go_down() -> None:
    for decay in ("cosine", "linear"):
        schedule = Schedule(steps=10, batch=1, held_out=0.1, decay=decay, final_rate=0.05)
        rates = [schedule.rate(step) for step in range(10)]
        assert rates[0] == 1.0
        assert rates == sorted(rates, reverse=True)
        assert 0.05 < rates[-1] < 0.2
    assert Schedule(steps=10, batch=1, held_out=0.1, decay="none").rate(9) == 1.0


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"held_out": 0.0}, {"held_out": 1.0}])
def test_schedules_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Schedule(**{"steps": 1, "batch": 1, "held_out": 0.1, **wrong})
