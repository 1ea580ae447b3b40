"""What an error at a token is worth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from block_jobs import make_job

from dibit.quantize.relative import relative_weights
from dibit.quantize.streams import HiddenStates, StreamConfig
from dibit.quantize.trainer import Schedule, held_out_loss, prepare


def test_weights_are_one_over_the_squares_with_a_mean_of_one(tmp_path: Path) -> None:
    stream = HiddenStates(11, 3, 4, config=StreamConfig(), directory=tmp_path)
    x = torch.randn(11, 3, 4, generator=torch.Generator().manual_seed(0))
    x[2, 1] *= 1000
    stream.write(0, x)
    weights = relative_weights(stream)
    assert weights.mean().item() == pytest.approx(1)
    product = weights * x.square().mean(dim=-1)
    torch.testing.assert_close(product, product[0, 0].expand_as(product))


def test_a_token_that_is_all_zeros_weighs_nothing(tmp_path: Path) -> None:
    stream = HiddenStates(1, 3, 4, config=StreamConfig(), directory=tmp_path)
    stream.write(0, torch.tensor([[[0.0] * 4, [1.0] * 4, [1.0] * 4]]))
    assert relative_weights(stream).tolist() == [[0.0, 1.5, 1.5]]


@torch.no_grad()
def test_the_loss_follows_them(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    schedule = Schedule(steps=1, batch=2, held_out=0.25)
    plain, relative = (prepare(job, dataclasses.replace(schedule, relative=own)) for own in (False, True))
    errors = torch.stack(
        [(job.block.dense(x, job.cos, job.sin) - y).square().mean(dim=-1)[0] for x, y in _held_out(plain)]
    )
    assert held_out_loss(job, job.block, plain) == pytest.approx(float(errors.mean()), rel=1e-5)
    assert job.relative_weights is not None
    weighted = errors * job.relative_weights[plain.held_out]
    assert held_out_loss(job, job.block, relative) == pytest.approx(float(weighted.mean()), rel=1e-5)


def _held_out(data):  # type: ignore[no-untyped-def]
    return [(data.inputs.rows(row[None]), data.targets.rows(row[None])) for row in data.held_out]
