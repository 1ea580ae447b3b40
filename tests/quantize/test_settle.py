"""Codes that become final before the end of training: they stay, the rest of the block goes on learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_blocks import KEYS, random_block, sizes
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import Format, dequantize
from dibit.quantize.block import BlockJob, rounded_block
from dibit.quantize.methods.block_ap import BlockAP, Learned
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.stats import Stats
from dibit.quantize.streams import HiddenStates, StreamConfig, advance
from dibit.quantize.trainer import prepare, train

METHOD = BlockAP(start="rtn", steps=20, batch=3, held_out=0.25, weight_rate=0.05, scale_rate=0.02, settle=0.5)


def make_job(directory: Path, format: Format) -> BlockJob:
    block = random_block(sizes(6, 2))
    listed = []
    for key in KEYS:
        linear: Any = block.linears[key]
        n, k = linear.weight.shape
        listed.append(LinearSite(f"layers.0.{key}", (Part(key, n),), n, k, "x", bias=True))
    stream = HiddenStates(8, 12, block.sizes.hidden, config=StreamConfig(), directory=directory)
    stream.write(0, torch.randn(8, 12, block.sizes.hidden, generator=torch.Generator().manual_seed(1)))
    formats = {site.name: format for site in listed}
    tables = block.sizes.rope.tables(12)
    outputs = stream.empty_like()
    advance(stream, block, *tables, batch=4, into=outputs)
    return BlockJob(0, block, tuple(listed), formats, stream, stream, *tables, 4, 0, float_outputs=outputs)


@pytest.mark.parametrize("format", [Format(2, 16), Format(3, 16, "fractional")], ids=lambda f: f.name)
def test_codes_settle_in_parts_and_stay(tmp_path: Path, format: Format) -> None:
    job = make_job(tmp_path, format)
    learned = Learned(METHOD, job, rounded_block(job, symmetric=False, reason="").weights)
    seen: dict[int, dict[str, Tensor]] = {}

    def before(step: int) -> None:
        learned.settle(step)
        seen[step] = {name: q.codes for name, q in learned.quantized().items()}

    data = prepare(job, METHOD.schedule())
    train(job, learned, METHOD.schedule(), data, baseline=1.0, before_step=before)
    final = seen[19]
    shares = {}
    for step in (9, 10, 12, 14, 16, 18):
        changed = [(seen[step][name] != final[name]).float().mean() for name in final]
        shares[step] = float(torch.stack(changed).mean())
    assert shares[9] > 0.002
    for step, left in ((10, 0.5), (12, 0.25), (14, 0.1), (16, 0.03), (18, 0.0)):
        assert shares[step] <= left
    packed: Any = learned.block()
    for site in job.sites:
        assert torch.equal(packed.linears[site.key].weight, dequantize(learned.quantized()[site.name]))


def test_a_restart_lets_go_of_them(tmp_path: Path) -> None:
    job = make_job(tmp_path, Format(2, 16))
    learned = Learned(METHOD, job, rounded_block(job, symmetric=False, reason="").weights)
    learned.settle(18)
    held = learned.groups()[0].parameters[0]
    learned.block().dense(torch.ones(1, 4, 48), job.cos, job.sin).square().sum().backward()
    assert held.grad is not None
    assert not bool(held.grad.any())
    learned.settle(0)
    learned.block().dense(torch.ones(1, 4, 48), job.cos, job.sin).square().sum().backward()
    assert bool(held.grad.any())


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="settle"):
        BlockAP(settle=1.0)


def test_no_steps_leave_the_first_codes(tmp_path: Path) -> None:
    job = make_job(tmp_path, Format(2, 16))
    found = BlockAP(start="rtn", steps=0).quantize_block(job)
    assert found.training is None
    assert found.method == "rtn"
    for site in job.sites:
        linear: Any = job.block.linears[site.key]
        expected = RTN(range_search=True).quantize(linear.weight, job.formats[site.name], Stats())
        assert torch.equal(found.weights[site.name].codes, expected.codes)
