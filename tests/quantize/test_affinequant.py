"""AffineQuant: never worse than the OmniQuant it starts from, exact, and its dense matrices only measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from block_jobs import make_job, packed_block
from random_blocks import run

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block
from dibit.kernels.formats import Format, QTensor
from dibit.quantize import quantize_checkpoint
from dibit.quantize.methods import affinequant
from dibit.quantize.methods.affinequant import AffineQuant
from dibit.quantize.methods.omniquant import Learned, OmniQuant
from dibit.quantize.report import TrainingReport
from dibit.quantize.trainer import held_out_loss
from dibit.quantize.transforms import Mixing, PairTurning, ValueMixing

SHORT: dict[str, Any] = {"steps": 12, "affine_steps": 24, "batch": 4, "held_out": 0.25, "affine_rate": 2e-2}


def best(report: TrainingReport | None) -> float:
    assert report is not None
    return min(loss for _, loss in report.validation)


def learned_transforms(job: Any) -> tuple[Learned, list[Any]]:
    """Trained for a while on anything, so that no parameter is at its start."""
    mixing = Mixing(job.block.sizes.kv_heads, 16, rate=1e-2, stability=1.0, stages=1, steps=1)
    transforms: list[Any] = [ValueMixing(mixing), PairTurning(job.block.sizes, rate=1e-2)]
    scales = {key: torch.randn(48 if key != "o" else 32) * 0.3 for key in ("qkv", "o", "gate_up")}
    learned = Learned(OmniQuant(), job, scales).with_transforms(transforms)
    rng = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for group in learned.groups():
            for parameter in group.parameters:
                parameter += 0.03 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
        learned.project()
    return learned, transforms


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("float_type", [torch.float32, torch.bfloat16])
def test_what_is_trained_is_what_is_packed(tmp_path: Path, bits: int, float_type: torch.dtype) -> None:
    job = make_job(tmp_path, bits=bits, float_type=float_type)
    learned, _ = learned_transforms(job)
    x = torch.randn(2, 12, job.block.sizes.hidden)
    with torch.no_grad():
        block, weights = learned.quantized()
        assert torch.equal(run(learned.block(), x), run(packed_block(job, block, weights), x))
        if float_type == torch.float32:
            difference = run(learned.folded(), x) - run(job.block, x)
            assert float(difference.norm() / run(job.block, x).norm()) < 1e-5


@pytest.mark.parametrize("bits", [2, 3])
def test_fractional_zero_points_are_trained_as_they_are_packed(tmp_path: Path, bits: int) -> None:
    job = make_job(tmp_path, bits=bits)
    job = dataclasses.replace(job, formats={name: Format(bits, 16, "fractional") for name in job.formats})
    learned, _ = learned_transforms(job)
    x = torch.randn(2, 12, job.block.sizes.hidden)
    with torch.no_grad():
        block, weights = learned.quantized()
        assert torch.equal(run(learned.block(), x), run(packed_block(job, block, weights), x))
        assert all(bool((weight.zeros == 2).any()) for weight in weights.values())


def test_every_parameter_is_reached_by_the_loss(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    learned, transforms = learned_transforms(job)
    run(learned.block(), torch.randn(2, 12, job.block.sizes.hidden)).square().sum().backward()  # type: ignore[no-untyped-call]
    for group in learned.groups():
        for parameter in group.parameters:
            assert parameter.grad is not None
            assert float((parameter.grad != 0).float().mean()) > 0.3
    assert transforms[0].mixing.beside.grad.dtype == torch.float64


@pytest.mark.parametrize("bits", [2, 3])
def test_it_goes_on_where_omniquant_ends_and_loses_no_more(tmp_path: Path, bits: int) -> None:
    job = make_job(tmp_path, bits=bits, same_streams=True)
    affine = AffineQuant(**SHORT)
    before = affine.first().quantize_block(job).training
    after = affine.quantize_block(job).training
    assert before is not None
    assert after is not None
    assert after.validation[: len(before.validation)] == before.validation
    assert after.losses[: len(before.losses)] == before.losses
    assert after.steps == 36
    assert best(after) < best(before)
    assert after.best_step > 12
    assert any("diagonal dominance at least 0." in note for note in after.notes)
    assert any("turned by up to" in note for note in after.notes)


def test_the_result_is_the_state_that_was_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path, same_streams=True)
    affine = AffineQuant(**SHORT)
    found = affine.quantize_block(job)
    task = affine.first().prepare(job)
    norms = [own if own is not None else old for own, old in ((found.attn_norm, job.block.attn_norm),)]
    block = Block(job.block.sizes, linears=dict(job.block.linears), attn_norm=norms[0], mlp_norm=job.block.mlp_norm)
    if found.mlp_norm is not None:
        block.mlp_norm = found.mlp_norm
    for site in job.sites:
        linear: Any = block.linears[site.key]
        block.linears[site.key] = type(linear)(linear.weight, found.biases.get(site.name, linear.bias))
    loss = held_out_loss(job, packed_block(job, block, dict(found.weights)), task.data)
    assert loss == pytest.approx(best(found.training), rel=1e-6)
    assert "layers.0.qkv" in found.biases


def test_scales_alone_are_kept_where_matrices_do_not_help(tmp_path: Path) -> None:
    job = make_job(tmp_path, same_streams=True)
    affine = AffineQuant(**{**SHORT, "affine_steps": 1, "affine_rate": 1.0, "stages": 1})
    found, before = affine.quantize_block(job), affine.first().quantize_block(job)
    assert best(found.training) <= best(before.training)
    for name, weight in before.weights.items():
        assert isinstance(weight, QTensor)
        assert torch.equal(found.weights[name].codes, weight.codes)
    assert found.training is not None
    assert "scales alone are kept" in found.training.notes[-1]


def test_training_that_fails_with_matrices_keeps_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, same_streams=True)

    def spoiled(self: ValueMixing, block: Block) -> None:
        if torch.is_grad_enabled():
            block.mlp_norm = block.mlp_norm * float("nan")

    monkeypatch.setattr(ValueMixing, "fold", spoiled)
    affine = AffineQuant(**SHORT)
    found, before = affine.quantize_block(job), affine.first().quantize_block(job)
    assert found.training is not None
    assert found.training.restarts == 2
    assert any("given up" in note for note in found.training.notes)
    assert torch.equal(found.weights["layers.0.o"].codes, before.weights["layers.0.o"].codes)
    assert found.fallback is None


def test_dense_matrices_are_measured_and_not_part_of_the_result(tmp_path: Path) -> None:
    job = make_job(tmp_path, bits=2, same_streams=True)
    plain = AffineQuant(**SHORT).quantize_block(job)
    found = AffineQuant(**SHORT, dense=True, dense_stability=1.0).quantize_block(job)
    for name, weight in plain.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes)
        assert torch.equal(found.weights[name].scales, weight.scales)
    assert found.training is not None
    note = found.training.notes[-1]
    assert "not part of the result" in note
    assert float(note.partition("would lose ")[2].split()[0]) < 1.0001 * best(found.training)
    assert note.count("condition number") == 2


def test_dense_matrices_and_their_inverses_change_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, bits=8)
    mixings = {k: Mixing(1, 48, rate=1.0, stability=0.1, stages=1, steps=1) for k in affinequant.DENSE_KEYS}
    plain = Learned(OmniQuant(), job, {})
    online = affinequant._Online(plain.with_transforms([affinequant._Columns(mixings)]), mixings)
    x = torch.randn(2, 12, 48)
    with torch.no_grad():
        for mixing in mixings.values():
            mixing.beside += torch.randn(1, 48, 48)
            mixing.project()
        expected = run(job.block, x)
        found = run(online.block(), x)
        # 8-bit rounding is all that is left of the difference.
        assert float((found - expected).norm() / expected.norm()) < 0.02
        assert float((run(online.learned.block(), x) - expected).norm() / expected.norm()) > 0.1


def test_a_checkpoint_is_written_and_read(tiny: Path, text: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(
        str(tiny),
        tmp_path / "out",
        method=AffineQuant(steps=4, affine_steps=4, stages=2, affine_rate=0.02),
        bits=3,
        group_size=32,
        calibration=text,
        samples=12,
        sequence_length=32,
    )
    assert {site.method for site in report.sites} == {"affinequant"}
    assert report.fallbacks == ()
    name = "model.layers.0.self_attn.v_proj"
    with_bias = open_checkpoint(tmp_path / "out").tensor(f"{name}.bias")
    assert not torch.equal(with_bias, open_checkpoint(tiny).tensor(f"{name}.bias"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"affine_steps": 0},
        {"stages": 0},
        {"stability": 0.0},
        {"affine_rate": 2.0},
        {"clip_rate": 0.0},
        {"values": False, "pairs": False},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).removeprefix("affine_")):
        AffineQuant(**wrong)
