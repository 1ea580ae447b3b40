"""Low-bit activations in training: rounded as the runtime does it, gradients passed, scales that take outliers over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from block_jobs import make_job, packed_block
from random_blocks import run, sizes
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.kernels.formats import dequantize
from dibit.kernels.qlinear import qlinear_reference, quantize_activations
from dibit.quantize.activations import rounded_inputs
from dibit.quantize.block import BlockJob, low_bit_block, rounded_block
from dibit.quantize.fold import copied, fold
from dibit.quantize.methods.affinequant import AffineQuant
from dibit.quantize.methods.omniquant import Learned, OmniQuant
from dibit.quantize.methods.smoothquant import KEYS, SmoothQuant, magnitudes, search
from dibit.quantize.report import TrainingReport
from dibit.quantize.trainer import Schedule, held_out_loss, prepare


def loud(directory: Path, *, bits: int, activation_bits: int | None) -> BlockJob:
    """A job whose block has inputs with loud channels at every site, as real models have."""
    job = make_job(directory, bits=bits, activation_bits=activation_bits, same_streams=True)
    block = copied(job.block)
    for key, width in (("qkv", 48), ("o", 32), ("gate_up", 48), ("down", 80)):
        scales = torch.ones(width)
        scales[::11] = 1 / 30
        fold(block, key, scales)
    return dataclasses.replace(job, block=block)


def rtn_loss(job: BlockJob, method: Any) -> float:
    data = prepare(job, Schedule(1, 1, method.held_out))
    rounded = low_bit_block(job, rounded_block(job, symmetric=False, reason="").weights)
    return held_out_loss(job, rounded_inputs(rounded, job.activation_bits), data)


def loss_of(job: BlockJob, found: Any, method: Any) -> float:
    block = Block(
        job.block.sizes,
        linears={
            site.key: FloatLinear(site_weight, found.biases.get(site.name, bias_of(job, site.key)))
            for site in job.sites
            for site_weight in [found.floats[site.name]]
        },
        attn_norm=found.attn_norm if found.attn_norm is not None else job.block.attn_norm,
        mlp_norm=found.mlp_norm if found.mlp_norm is not None else job.block.mlp_norm,
    )
    data = prepare(job, Schedule(1, 1, method.held_out))
    low = packed_block(job, block, dict(found.weights))
    return held_out_loss(job, rounded_inputs(low, job.activation_bits), data)


def bias_of(job: BlockJob, key: str) -> Tensor:
    linear: Any = job.block.linears[key]
    found: Tensor = linear.bias
    return found


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_trained_block_computes_what_the_runtime_does(tmp_path: Path, bits: int) -> None:
    job = make_job(tmp_path, bits=4, activation_bits=bits)
    learned = Learned(OmniQuant(), job, {"qkv": torch.randn(48) * 0.3})
    with torch.no_grad():
        block, weights = learned.quantized()
        served = copied(block)
        for site in job.sites:
            quantized, bias = weights[site.name], bias_of(job, site.key)

            def call(x: Tensor, q: Any = quantized, b: Tensor = bias) -> Tensor:
                return qlinear_reference(x, q, b, activation_bits=bits)

            served.linears[site.key] = call
        x = torch.randn(2, 12, 48)
        found, expected = run(learned.block(), x), run(served, x)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        without = run(packed_block(job, block, weights), x)
        assert float((found - without).norm() / without.norm()) > 0.3 * 2.0**-bits


def test_gradients_pass_the_rounding() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    weight = torch.randn(2, 5)
    block = Block(sizes(6, 2), linears={"o": FloatLinear(weight)}, attn_norm=weight, mlp_norm=weight)
    y = rounded_inputs(block, 4).linears["o"](x)
    assert torch.equal(y, quantize_activations(x.detach(), bits=4) @ weight.T)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, weight.sum(dim=0).expand(3, 5))
    assert rounded_inputs(block, None) is block


def test_magnitudes_are_those_of_the_inputs_and_shared_by_heads(tmp_path: Path) -> None:
    job = loud(tmp_path, bits=8, activation_bits=8)
    data = prepare(job, Schedule(1, 1, 0.25))
    for key in KEYS:
        found = magnitudes(job, data, key)
        assert found.inputs.shape == found.weights.shape
        quiet = torch.ones_like(found.inputs, dtype=torch.bool)
        quiet[::11] = False
        assert float(found.inputs[~quiet].median()) > 8 * float(found.inputs[quiet].median())
        scales = found.scales(0.5)
        assert float(scales[~quiet].median()) > 2 * float(scales[quiet].median())
        assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)
    assert magnitudes(job, data, "o").inputs.shape == (32,)


@pytest.mark.parametrize("bits", [4, 8])
def test_smoothquant_takes_loud_channels_over(tmp_path: Path, bits: int) -> None:
    job = loud(tmp_path, bits=bits, activation_bits=bits)
    method = SmoothQuant(tries=4, held_out=0.25)
    found = method.quantize_block(job)
    assert loss_of(job, found, method) < 0.5 * rtn_loss(job, method)
    for site in job.sites:
        difference = dequantize(found.weights[site.name]) - found.floats[site.name]
        assert float(difference.norm() / found.floats[site.name].norm()) < 0.3


def test_smoothquant_is_rounding_where_nothing_is_gained(tmp_path: Path) -> None:
    """Any scale loses to none on weights that are exactly on their grid."""
    job = make_job(tmp_path, bits=4, same_streams=True)
    for site in job.sites:
        linear: Any = job.block.linears[site.key]
        chosen = job.formats[site.name]
        exact = dequantize(chosen.encode(linear.weight, *chosen.ranges(linear.weight)))
        job.block.linears[site.key] = FloatLinear(exact, linear.bias)
    found = SmoothQuant(tries=3, held_out=0.25).quantize_block(job)
    assert found.attn_norm is None
    assert found.mlp_norm is None
    assert found.biases == {}
    rounded = rounded_block(job, symmetric=False, reason="")
    for site in job.sites:
        assert torch.equal(found.weights[site.name].codes, rounded.weights[site.name].codes)


def best(report: TrainingReport | None) -> float:
    assert report is not None
    return min(loss for _, loss in report.validation)


def test_training_with_rounded_activations_beats_searching_scales(tmp_path: Path) -> None:
    job = loud(tmp_path, bits=3, activation_bits=6)
    smooth = SmoothQuant(tries=4, held_out=0.25)
    searched = loss_of(job, smooth.quantize_block(job), smooth)
    options: dict[str, Any] = {"steps": 40, "batch": 4, "held_out": 0.25, "transform_rate": 1e-2}
    omni = OmniQuant(**options).quantize_block(job)
    affine = AffineQuant(affine_steps=16, affine_rate=1e-2, **options).quantize_block(job)
    assert best(omni.training) < 0.95 * searched
    assert best(affine.training) <= best(omni.training)
    assert omni.training is not None
    assert omni.training.baseline == pytest.approx(rtn_loss(job, smooth))
    assert loss_of(job, omni, smooth) == pytest.approx(best(omni.training), rel=1e-4)


def test_training_starts_from_the_searched_scales(tmp_path: Path) -> None:
    """The loud channels in front of down are quieted although `transform_down` is not asked for."""
    job = loud(tmp_path, bits=8, activation_bits=4)
    method = OmniQuant(steps=1, batch=4, held_out=0.25)
    task = method.prepare(job)
    found = search(job, task.data, symmetric=False, tries=9)
    started = method.start(task)
    assert set(found.scales) == set(KEYS)
    searched = Learned(method, job, {key: scales.log() for key, scales in found.scales.items()})
    plain = Learned(method, job, {})
    with torch.no_grad():
        losses = [held_out_loss(job, one.block(), task.data) for one in (started, searched, plain)]
    assert losses[0] <= losses[1] < 0.7 * losses[2]
    weights_only = dataclasses.replace(job, activation_bits=None)
    assert "down" not in method.start(method.prepare(weights_only)).scales


@pytest.mark.parametrize("wrong", [{"tries": 0}, {"held_out": 0.0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SmoothQuant(**wrong)
